"""JumpReLU: each feature has a threshold of its own, below which it is silent."""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from saekit.sae.base import SAEConfig
from saekit.sae.threshold import ThresholdSAE

__all__ = ["JumpReLUConfig", "JumpReLUSAE"]


class JumpReLUConfig(SAEConfig):
    """A JumpReLU SAE and how its sparsity is trained."""

    kind: Literal["jumprelu"] = "jumprelu"
    """Architecture."""
    target_l0: float | None = None
    """Mean number of active features a token that training steers to; None for an SAE that was trained elsewhere."""
    sparsity: Literal["step", "tanh"] = "step"
    """Penalty on active features: their number (`step`), or tanh of their activations (`tanh`)."""
    bandwidth: float = Field(default=0.5, gt=0)
    """Width of the band around a threshold in which its gradient is estimated, in units of normalised activations."""

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.d_sae:
            raise ValueError(f"target_l0 is {self.target_l0}, needs more than 0 and at most d_sae = {self.d_sae}")
        return self


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
