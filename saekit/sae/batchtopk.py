"""BatchTopK: a batch keeps its N * k largest pre-activations, so a token uses as many features as it needs."""

from collections.abc import Mapping
from typing import Literal

import torch
from saekit_kernels import encode_batch_topk
from torch import nn

from saekit.sae.threshold import ThresholdSAE
from saekit.sae.topk import KConfig

__all__ = ["BatchTopKConfig", "BatchTopKSAE", "encode_batch_topk"]


class BatchTopKConfig(KConfig):
    """A BatchTopK SAE."""

    kind: Literal["batchtopk"] = "batchtopk"
    """Architecture."""


class BatchTopKSAE(ThresholdSAE):
    """`z * (z > threshold)` with one threshold for all features, so that a token does not depend on its batch.

    Training keeps the N * k largest entries of each batch; the threshold is the running mean of the smallest one kept.

    Attributes:
        threshold: [1] float32, in units of raw activations.

    Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders", section 3.
    """

    cfg: KConfig

    def __init__(
        self,
        cfg: KConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an SAE with tied random directions and a threshold of 0: every positive pre-activation is active."""
        super().__init__(cfg, seed=seed, hook_point=hook_point, source=source, dtype=dtype)
        self.threshold = nn.Parameter(
            torch.zeros(1, dtype=torch.promote_types(dtype, torch.float32)), requires_grad=False
        )
