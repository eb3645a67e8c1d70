"""Objectives of Matryoshka SAEs: every prefix of feature groups has to reconstruct by itself."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from saekit.sae.losses import reconstruction_loss
from saekit.sae.matryoshka import MatryoshkaBatchTopKSAE, MatryoshkaConfig, MatryoshkaTopKSAE
from saekit.training.objective import BatchTopKObjective, Code, Objective, TopKObjective

__all__ = ["MatryoshkaBatchTopKObjective", "MatryoshkaTopKObjective", "group_codes"]


def group_codes(code: Code, bounds: Sequence[int]) -> list[Code]:
    """Returns the entries of each group of features alone, as rows of varying length.

    Args:
        code: entries of a batch; unused places of a token's k stand at feature 0 with nothing to add, and are left out.
        bounds: rising numbers; group i has the features from bounds[i] to bounds[i + 1].
    """
    values, indices = code.values.reshape(-1), code.indices.reshape(-1)
    offsets = code.offsets
    if offsets is None:
        offsets = torch.arange(0, code.values.numel() + 1, code.values.shape[1], device=indices.device)
    is_used = values.detach() != 0
    # Entries in the order of their groups: all places are numbers that the device works out, and are not asked for.
    targets, ends, rows = torch.full_like(indices, len(values)), offsets.new_zeros(()), []
    for start, end in pairwise(bounds):
        is_member = is_used & (indices >= start) & (indices < end)
        count = torch.nn.functional.pad(is_member.cumsum(0), (1, 0))
        targets = torch.where(is_member, ends + count[:-1], targets)
        ends = ends + count[-1]
        rows.append(count[offsets])
    order = indices.new_zeros(len(values) + 1)
    order = order.scatter_(0, targets, torch.arange(len(values), device=indices.device))[:-1]
    # The one number of each group that has to be known here.
    sizes = torch.stack([counts[-1] for counts in rows]).tolist()
    places = torch.split(order[: sum(sizes)], sizes)
    return [Code(values[place], indices[place], counts) for place, counts in zip(places, rows, strict=True)]


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
        total, fvu = target.new_zeros(()), target.new_zeros(())
        prefixes = self.cfg.prefixes()
        groups = group_codes(code, [-first, *(end - first for end, _ in prefixes)])
        for (_, weight), group in zip(prefixes, groups, strict=True):
            error = error - self.decode(group.values, group, self.sae.W_dec)
            fvu = reconstruction_loss(error, self.total_variance)
            total = total + weight * fvu
        return total, fvu, error


class MatryoshkaTopKObjective(_Nested, TopKObjective):
    """Nested reconstruction of each token's k largest entries, and AuxK."""

    sae: MatryoshkaTopKSAE
    cfg: MatryoshkaConfig


class MatryoshkaBatchTopKObjective(_Nested, BatchTopKObjective):
    """Nested reconstruction of a batch's N * k largest entries, and AuxK."""

    sae: MatryoshkaBatchTopKSAE
    cfg: MatryoshkaConfig
