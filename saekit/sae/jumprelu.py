"""JumpReLU: each feature has a threshold of its own, below which it is silent."""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saekit.sae.base import SAE, SAEConfig

__all__ = ["JumpReLUConfig", "JumpReLUSAE", "select_above"]


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


class JumpReLUSAE(SAE):
    """`z * (z > threshold)` with one threshold a feature, kept in float32.

    Attributes:
        threshold: [d_sae] float32, in units of raw activations.

    Source: Rajamanoharan et al. 2024, "Jumping ahead", section 3.
    """

    cfg: JumpReLUConfig
    threshold: nn.Parameter

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

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (top_acts [N, K], top_indices [N, K]), K the most features any of the tokens has; the largest first."""
        return select_above(self.pre_acts(x), self.threshold)

    @torch.no_grad()
    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by `factor`."""
        self.threshold.mul_(factor)


def select_above(pre_acts: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (top_acts [N, K], top_indices [N, K]) of the positive entries of pre_acts [N, d_sae] above their threshold.

    K is the most that any of the tokens has; the largest come first, places not used hold 0 and 0.

    Args:
        threshold: [d_sae], or [1] for all features.
    """
    acts = torch.where(pre_acts > threshold.clamp_min(0), pre_acts, 0.0)
    most = int((acts > 0).sum(-1).max()) if acts.shape[0] else 0
    top_acts, top_indices = torch.topk(acts, most, dim=-1)
    return top_acts, torch.where(top_acts > 0, top_indices, 0)
