"""Gated: one affine map decides which features are active, another of the same directions how active they are."""

from collections.abc import Mapping
from typing import Literal

import torch
from saekit_kernels import encode_threshold
from torch import Tensor, nn

from saekit.sae.penalized import PenalizedConfig
from saekit.sae.rows import ActiveRows, RowSAE

__all__ = ["GatedConfig", "GatedSAE"]


class GatedConfig(PenalizedConfig):
    """A Gated SAE."""

    kind: Literal["gated"] = "gated"
    """Architecture."""


class GatedSAE(RowSAE):
    """`relu(exp(r_mag) * u + b_mag) * (u + b_enc > 0)` with u = encoder input @ W_enc.

    Attributes:
        b_enc: bias of the gate [d_sae]; pre-activations are those of the gate.
        r_mag: logarithm of each feature's gain [d_sae], at least float32.
        b_mag: bias of the magnitudes [d_sae].

    Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders", section 3.2.
    """

    cfg: GatedConfig

    def __init__(
        self,
        cfg: GatedConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an SAE with tied random directions whose gate and magnitudes are alike."""
        super().__init__(cfg, seed=seed, hook_point=hook_point, source=source, dtype=dtype)
        self.r_mag = nn.Parameter(torch.zeros(cfg.d_sae, dtype=torch.promote_types(dtype, torch.float32)))
        self.b_mag = nn.Parameter(torch.zeros(cfg.d_sae, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draws W_dec's directions from `seed`, ties the encoder to them and zeroes the biases and gains."""
        super().reset_parameters(seed)
        # The base class draws before there are any.
        for parameter in (getattr(self, "r_mag", None), getattr(self, "b_mag", None)):
            if parameter is not None:
                parameter.zero_()

    def magnitudes(self, inner: Tensor, indices: Tensor) -> Tensor:
        """Returns the activations of open gates.

        Args:
            inner: u, pre-activations less the gate's bias [nnz].
            indices: the feature of each [nnz] int64.
        """
        return (self.r_mag.exp()[indices] * inner + self.b_mag[indices]).relu()

    def active_rows(self, x: Tensor) -> ActiveRows:
        """Returns the features of x [N, d_in] with open gates and positive magnitudes."""
        closed = self.b_enc.new_zeros(self.d_sae, dtype=torch.promote_types(self.b_enc.dtype, torch.float32))
        # The gate is a step: no gradient goes through it, hence none to its bias.
        bias = self.b_enc.detach()
        gates, indices, offsets = encode_threshold(self.encoder_input(x), self.W_enc, bias, closed)
        acts = self.magnitudes(gates - bias[indices], indices)
        # <= rather than not >: NaN stays, to be seen.
        is_active = ~(acts <= 0)
        before = torch.nn.functional.pad(is_active.cumsum(0), (1, 0))
        return ActiveRows(acts[is_active], indices[is_active], before[offsets])

    @torch.no_grad()
    def scale_thresholds(self, factor: float) -> None:
        """Multiplies the magnitudes' biases by `factor`; a gate's own bias is its b_enc."""
        self.b_mag.mul_(factor)

    @torch.no_grad()
    def shift_inputs(self, shift: Tensor) -> None:
        """Adds `shift` [d_sae] to every feature's u: to both biases, as b_enc alone does not reach the magnitudes."""
        super().shift_inputs(shift)
        self.b_mag.add_((self.r_mag.double().exp() * shift).to(self.b_mag.dtype))
