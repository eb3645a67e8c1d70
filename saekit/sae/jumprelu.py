"""JumpReLU: each feature has a threshold of its own, below which it is silent."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from saekit.sae.penalized import PenalizedConfig
from saekit.sae.threshold import ThresholdSAE

__all__ = ["JumpReLUConfig", "JumpReLUSAE"]


class JumpReLUConfig(PenalizedConfig):
    """A JumpReLU SAE and how its sparsity is trained."""

    kind: Literal["jumprelu"] = "jumprelu"
    """Architecture."""
    sparsity: Literal["step", "tanh", "quadratic"] = "step"
    """Penalty on active features: their number (`step`), tanh of their activations (`tanh`), or beside the former
    the squared distance of a token's number of them from the wanted L0, so that tokens become alike (`quadratic`)."""
    bandwidth: float = Field(default=0.5, gt=0)
    """Width of the band around a threshold in which its gradient is estimated, in units of normalised activations."""
    ste_to_input: bool = False
    """Whether the estimated gradient reaches the pre-activations too, not the thresholds alone."""


class JumpReLUSAE(ThresholdSAE):
    """`z * (z > threshold)` with one threshold a feature, kept in float32.

    Attributes:
        threshold: [d_sae] float32, in units of raw activations.

    Source: Rajamanoharan et al. 2024, "Jumping ahead", section 3.
    """

    cfg: JumpReLUConfig

    def __init__(
        self,
        cfg: JumpReLUConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an SAE with tied random directions and every threshold at 0.001."""
        super().__init__(cfg, seed=seed, hook_point=hook_point, source=source, dtype=dtype)
        # bfloat16 cannot represent the small steps a threshold moves by, so it stays at least float32.
        self.threshold = nn.Parameter(torch.full((cfg.d_sae,), 1e-3, dtype=torch.promote_types(dtype, torch.float32)))
