"""What the configs of SAEs share whose sparsity comes from a penalty."""

from typing import Self

from pydantic import model_validator

from saekit.sae.base import SAEConfig

__all__ = ["PenalizedConfig"]


class PenalizedConfig(SAEConfig):
    """An SAE that is asked for an L0; training finds the weight of the penalty that gives it."""

    target_l0: float | None = None
    """Mean number of active features a token that training steers to; None for an SAE that was trained elsewhere."""

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.d_sae:
            raise ValueError(f"target_l0 is {self.target_l0}, needs more than 0 and at most d_sae = {self.d_sae}")
        return self
