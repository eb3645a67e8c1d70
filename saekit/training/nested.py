"""Objectives of Matryoshka SAEs: every prefix of feature groups has to reconstruct by itself."""

import torch
from torch import Tensor

from saekit.sae.losses import reconstruction_loss
from saekit.sae.matryoshka import MatryoshkaBatchTopKSAE, MatryoshkaConfig, MatryoshkaTopKSAE
from saekit.training.objective import BatchTopKObjective, Code, Objective, TopKObjective

__all__ = ["MatryoshkaBatchTopKObjective", "MatryoshkaTopKObjective", "group_code"]


def group_code(code: Code, start: int, end: int) -> Code:
    """Returns the entries of features `start` to `end` alone, as rows of varying length."""
    is_member = (code.indices >= start) & (code.indices < end)
    # Unused places of a token's k stand at feature 0 with nothing to add.
    is_member &= code.values.detach() != 0
    if code.offsets is None:
        counts = is_member.sum(1)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    else:
        offsets = torch.nn.functional.pad(is_member.cumsum(0), (1, 0))[code.offsets]
    return Code(code.values[is_member], code.indices[is_member], offsets)


class _Nested(Objective):
    """Adds the prefixes' reconstructions to an objective that selects entries."""

    sae: MatryoshkaTopKSAE | MatryoshkaBatchTopKSAE
    cfg: MatryoshkaConfig

    def reconstruct(self, inputs: Tensor, target: Tensor, code: Code) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the weighted mean of the prefixes' reconstruction terms, and the FVU and error of all features [N, d_in].

        Each entry is decoded once, with its group, and prefixes are running sums: the work is that of one plain decode and a
        [N, d_in] sum for each group.

        Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", equation 4.
        """
        error, first = target - self.sae.b_dec, self.layout.features(self.cfg.d_sae).start
        total, fvu, start = target.new_zeros(()), target.new_zeros(()), 0
        for end, weight in self.cfg.prefixes():
            group = group_code(code, start - first, end - first)
            error = error - self.decode(group.values, group, self.sae.W_dec)
            fvu = reconstruction_loss(error, self.total_variance)
            total = total + weight * fvu
            start = end
        return total, fvu, error


class MatryoshkaTopKObjective(_Nested, TopKObjective):
    """Nested reconstruction of each token's k largest entries, and AuxK."""

    sae: MatryoshkaTopKSAE
    cfg: MatryoshkaConfig


class MatryoshkaBatchTopKObjective(_Nested, BatchTopKObjective):
    """Nested reconstruction of a batch's N * k largest entries, and AuxK."""

    sae: MatryoshkaBatchTopKSAE
    cfg: MatryoshkaConfig
