"""ReLU: every positive pre-activation is active; an L1 or Lp penalty keeps them few in training."""

from typing import Literal

import torch
from pydantic import Field
from saekit_kernels import encode_threshold
from torch import Tensor

from saekit.sae.penalized import PenalizedConfig
from saekit.sae.rows import ActiveRows, RowSAE

__all__ = ["L1Config", "ReLUConfig", "ReLUSAE"]


class L1Config(PenalizedConfig):
    """What the configs of SAEs share whose activations are penalised by their size."""

    is_norm_weighted: bool = True
    """Whether an activation is penalised times its decoder row's norm, which then is free: nothing is gained by a small
    activation of a long row. False = rows of unit norm throughout, and the penalty on the activations alone."""
    p_end: float = Field(default=1.0, gt=0, le=1)
    """Exponent of the penalty at the end of training; 1 = L1 throughout, less anneals it from 1 downwards."""
    p_start_fraction: float = Field(default=0.2, ge=0, lt=1)
    """Part of training after which the exponent begins to fall, linearly."""


class ReLUConfig(L1Config):
    """A ReLU SAE and how its sparsity is trained."""

    kind: Literal["relu"] = "relu"
    """Architecture."""


class ReLUSAE(RowSAE):
    """`relu(pre-activations)`.

    Source: Bricken et al. 2023, "Towards monosemanticity"; Anthropic, "Circuits updates - April 2024" (the norm-weighted
    penalty); Karvonen et al. 2024, arXiv 2408.00113, section 4 (p-annealing).
    """

    cfg: L1Config

    def active_rows(self, x: Tensor) -> ActiveRows:
        """Returns the features with positive pre-activations of x [N, d_in]."""
        nothing = self.b_enc.new_zeros(self.d_sae, dtype=torch.promote_types(self.b_enc.dtype, torch.float32))
        return ActiveRows(*encode_threshold(self.encoder_input(x), self.W_enc, self.b_enc, nothing))

    def scale_thresholds(self, factor: float) -> None:
        """Does nothing: pre-activations are compared with 0."""

    @torch.no_grad()
    def absorb_decoder_norms(self) -> None:
        """Moves the decoder rows' sizes into the encoder; reconstructions stay as they are."""
        norms = self.decoder_norms().clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        self.W_dec.div_(norms[:, None])
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
