"""Transcoder: reads activations at one place of the model and predicts those at another, e.g. an MLP's output from its input."""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.base import SAEOutput
from saekit.sae.topk import KConfig, TopKSAE

__all__ = ["Transcoder", "TranscoderConfig"]


class TranscoderConfig(KConfig):
    """A transcoder of which every token keeps its k largest features."""

    kind: Literal["transcoder"] = "transcoder"
    """Architecture."""
    d_out: int = Field(default=0, ge=0)
    """Width of the activations that are predicted; 0 = not known yet (a recipe leaves it to the store it trains on)."""
    has_skip: bool = False
    """Whether a linear map of the input is added to the prediction, so that features need not spell out what is linear."""
    apply_b_dec_to_input: Literal[False] = False
    """Always false: b_dec belongs to the activations that are predicted."""

    def with_d_out(self, d_out: int) -> Self:
        """Returns the config for predicted activations of width `d_out`.

        Raises:
            ConfigError: the config already names another width.
        """
        return self._with_width("d_out", d_out, "the predicted activations'")


class Transcoder(TopKSAE):
    """`y_hat = topk(x @ W_enc + b_enc) @ W_dec + b_dec (+ x @ W_skip)`; `x_hat` of its output is that y_hat.

    Attributes:
        W_dec: [d_sae, d_out], rows of unit norm: activations are in units of what is predicted.
        b_dec: [d_out].
        W_skip: [d_in, d_out], or None without a skip.

    Source: Dunefsky et al. 2024, arXiv 2406.11944, section 3; Paulo et al. 2025, arXiv 2501.18823, section 3 (the skip).
    """

    cfg: TranscoderConfig
    W_skip: nn.Parameter | None

    def __init__(
        self,
        cfg: TranscoderConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes a transcoder with random directions and no skip as yet (zeros).

        Raises:
            ConfigError: the config does not say d_in or d_out.
        """
        if cfg.d_out < 1:
            raise ConfigError(f"sae: d_out is {cfg.d_out}, needs the predicted width; use cfg.with_d_out(width)")
        super().__init__(cfg, seed=seed, hook_point=hook_point, source=source, dtype=dtype)
        skip = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_out, dtype=dtype)) if cfg.has_skip else None
        self.register_parameter("W_skip", skip)

    @property
    def d_out(self) -> int:
        """Width of the activations that are predicted."""
        return self.cfg.d_out

    @property
    def is_transcoder(self) -> bool:
        """Always true."""
        return True

    @property
    def hook_point_out(self) -> str | None:
        """Whose activations are predicted, as training noted it in `source`; None when unknown."""
        target = self.source.get("target_hook_point")
        return target if isinstance(target, str) else None

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Draws the directions of encoder and decoder from `seed`, each of unit norm, and zeroes everything else."""
        generator = torch.Generator().manual_seed(seed)
        for rows in (self.W_enc.T, self.W_dec):
            directions = torch.randn(rows.shape, generator=generator)
            rows.copy_(directions / directions.norm(dim=1, keepdim=True))
        for parameter in (self.b_enc, self.b_dec, getattr(self, "W_skip", None)):
            if parameter is not None:
                parameter.zero_()

    def skip(self, x: Tensor) -> Tensor | float:
        """Returns the linear part of the prediction for x [N, d_in]; 0 without a skip."""
        return 0.0 if self.W_skip is None else x.reshape(-1, self.d_in).to(self.W_skip.dtype) @ self.W_skip

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes x [N, d_in] and predicts y_hat [N, d_out]."""
        y_hat, top_acts, top_indices = super().forward(x)
        return SAEOutput(y_hat + self.skip(x), top_acts, top_indices)
