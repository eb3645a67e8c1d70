"""Matryoshka: the first features alone have to reconstruct as well, so that general ones come first and are not split up."""

from itertools import accumulate
from typing import Literal, Self

from pydantic import model_validator

from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.topk import KConfig, TopKSAE

__all__ = [
    "MatryoshkaBatchTopKConfig",
    "MatryoshkaBatchTopKSAE",
    "MatryoshkaConfig",
    "MatryoshkaTopKConfig",
    "MatryoshkaTopKSAE",
]

GROUP_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Groups of the SAEBench models (Karvonen et al. 2025, arXiv 2503.09532, section 3.2)."""


class MatryoshkaConfig(KConfig):
    """What both Matryoshka SAEs share: how the features are grouped."""

    group_fractions: tuple[float, ...] = GROUP_FRACTIONS
    """Part of the features in each group, first group first; each prefix of groups is trained to reconstruct alone."""
    group_weights: tuple[float, ...] | None = None
    """Weight of each prefix's reconstruction in the loss, divided by their sum; None = all the same."""

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        fractions, weights = self.group_fractions, self.group_weights
        if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"group_fractions are {list(fractions)}, need positive numbers that add up to 1")
        if weights is not None and (len(weights) != len(fractions) or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(
                f"group_weights are {list(weights)}, need {len(fractions)} numbers, none negative and not all 0"
            )
        return self

    def prefixes(self) -> list[tuple[int, float]]:
        """Returns (number of features, weight) of each prefix, the last of d_sae features; the weights add up to 1.

        Prefixes that rounding makes equal, in a very small SAE, are one prefix with the weight of all.
        """
        weights = self.group_weights or (1.0,) * len(self.group_fractions)
        ends = [max(1, round(part * self.d_sae)) for part in accumulate(self.group_fractions)]
        ends[-1] = self.d_sae
        merged: dict[int, float] = {}
        for end, weight in zip(ends, weights, strict=True):
            merged[end] = merged.get(end, 0.0) + weight / sum(weights)
        return sorted(merged.items())


class MatryoshkaTopKConfig(MatryoshkaConfig):
    """A Matryoshka SAE of which every token keeps its k largest features."""

    kind: Literal["matryoshka_topk"] = "matryoshka_topk"
    """Architecture."""


class MatryoshkaBatchTopKConfig(MatryoshkaConfig):
    """A Matryoshka SAE of which a batch keeps its N * k largest features."""

    kind: Literal["matryoshka_batchtopk"] = "matryoshka_batchtopk"
    """Architecture."""


class MatryoshkaTopKSAE(TopKSAE):
    """A TopK SAE whose features are ordered in nested groups; the groups change training only.

    Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", section 3.
    """

    cfg: MatryoshkaTopKConfig


class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """A BatchTopK SAE whose features are ordered in nested groups; the groups change training only.

    Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", section 3.
    """

    cfg: MatryoshkaBatchTopKConfig
