"""TopK: each token keeps its k largest pre-activations."""

from typing import Literal, Self

import torch
from pydantic import model_validator
from saekit_kernels import encode_topk
from torch import Tensor

from saekit.sae.base import SAE, SAEConfig

__all__ = ["KConfig", "TopKConfig", "TopKSAE"]


class KConfig(SAEConfig):
    """What the configs of SAEs with a given number of active features share."""

    k: int
    """Features a token may use, or uses on average where the batch shares them out."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k < 1:
            raise ValueError(f"k is {self.k}, needs a positive number of features a token")
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, needs at most d_sae = {self.d_sae}")
        return self


class TopKConfig(KConfig):
    """A TopK SAE."""

    kind: Literal["topk"] = "topk"
    """Architecture."""


class TopKSAE(SAE):
    """`relu(top-k of the pre-activations)`, exactly k features at most for every token.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    """

    cfg: KConfig

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (top_acts [N, k], top_indices [N, k]), the largest first."""
        values, indices = encode_topk(self.encoder_input(x), self.W_enc, self.b_enc, self.cfg.k)
        return values, torch.where(values > 0, indices, 0)

    def scale_thresholds(self, factor: float) -> None:
        """Does nothing: which pre-activations are largest does not depend on their scale."""
