"""Exact folds: from the numbers a release stores to the canonical form that `Dictionary` computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.hub.headers import is_true
from saekit.sae.activation import Activation
from saekit.sae.dictionary import Dictionary, DictionaryConfig
from saekit.sae.site import Site

__all__ = ["Canonical", "checked_scale", "projected", "threshold_over"]

# Rows of the encoder in float64 at a time: few enough to stay in the cache.
_CHUNK = 256


def projected(bias: Tensor, W_enc: Tensor) -> Tensor:
    """Returns `bias @ W_enc`, summed in float64; bias [d_in], W_enc [d_in, F]."""
    wide, rows = bias.double(), W_enc.T
    block = rows.new_empty(min(_CHUNK, len(rows)), rows.shape[1], dtype=torch.float64)
    parts = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    return torch.cat([block[: len(part)].copy_(part) @ wide for part in parts])


def checked_scale(factor: float) -> float:
    """Returns a factor by which float32 weights can be multiplied.

    Raises:
        ConfigError: it is not above 0, or so far from 1 that weights would vanish or overflow.
    """
    if not 1e-15 < factor < 1e15:
        raise ConfigError(f"a scale of {factor}, needs one between 1e-15 and 1e15")
    return factor


def threshold_over(threshold: Tensor, norms: Tensor) -> Tensor:
    """Returns the t for which `p > t` says what `p * norms > threshold` does, for every finite p; both broadcast.

    A feature of norm 0 is compared as 0: it is never active at a threshold of 0 or more, and always below.
    """
    most = torch.finfo(torch.float32).max
    return torch.nan_to_num(threshold / norms, nan=most, posinf=most, neginf=-most)


@dataclass(kw_only=True)
class Canonical:
    """Weights on their way to canonical form; every fold changes them in place and leaves the function as it is.

    `W_enc` and `W_dec` may be in half precision; a fold that changes their numbers makes float32 of them first.

    Source: algebra only; each fold is the substitution that its name says.
    """

    W_enc: Tensor
    """[d_in, F]."""
    b_enc: Tensor
    """[F]; the bias of the gate for gated dictionaries."""
    W_dec: Tensor
    """[F, d_out]."""
    b_dec: Tensor
    """[d_out]."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors of `Dictionary` by name."""

    def subtract_from_input(self, pre_bias: Tensor) -> None:
        """Folds an encoder that reads `u - pre_bias`.

        Raises:
            ConfigError: the bias has another width than the input.
        """
        if pre_bias.shape[0] != self.W_enc.shape[0]:
            raise ConfigError(
                f"bias of width {pre_bias.shape[0]} on an input of width {self.W_enc.shape[0]}, needs equal ones"
            )
        shift = projected(pre_bias, self.W_enc)
        self.b_enc = (self.b_enc.double() - shift).float()
        if "b_mag" in self.extra:
            scale = self.extra["r_mag"].double().exp()
            self.extra["b_mag"] = (self.extra["b_mag"].double() - scale * shift).float()
        if "W_glu" in self.extra:
            self.extra["b_glu"] = (self.extra["b_glu"].double() - projected(pre_bias, self.extra["W_glu"])).float()

    def scale_input(self, factor: float) -> None:
        """Folds an encoder that reads `factor * x`; raises as `checked_scale` does."""
        if checked_scale(factor) == 1.0:
            return
        self.W_enc = self.W_enc.float().mul_(factor)
        if "W_glu" in self.extra:
            self.extra["W_glu"].mul_(factor)

    def scale_output(self, factor: float) -> None:
        """Folds a reconstruction that is multiplied by `factor`; raises as `checked_scale` does."""
        if checked_scale(factor) == 1.0:
            return
        self.W_dec = self.W_dec.float().mul_(factor)
        self.b_dec.mul_(factor)

    def scale_features(self, factor: Tensor | float) -> None:
        """Multiplies each feature's activation by `factor` > 0, and divides its decoder row by it.

        Exact where each feature decides for itself (relu, jumprelu, gated), and for top-k where the release compares the
        multiplied pre-activations.

        Args:
            factor: [F] or one number.

        Raises:
            ConfigError: a factor is not finite.
        """
        if isinstance(factor, Tensor) and not is_true(torch.isfinite(factor).all()):
            raise ConfigError("decoder rows whose norms overflow, needs smaller weights")
        self.W_enc = self.W_enc.float().mul_(factor)
        self.b_enc = self.b_enc * factor
        # A row of zeros writes nothing whatever it is divided by.
        divisor = factor.masked_fill(factor == 0, 1.0)[:, None] if isinstance(factor, Tensor) else factor
        self.W_dec = self.W_dec.float().div_(divisor)
        for name in ("b_mag", "threshold"):
            if name in self.extra:
                self.extra[name] = self.extra[name] * factor

    def decoder_norms(self) -> Tensor:
        """Returns the norm of each decoder row, [F]."""
        norms: Tensor = torch.linalg.vector_norm(self.W_dec, dim=1, dtype=torch.float32)
        return norms

    def build(
        self,
        activation: Activation,
        *,
        units: str,
        site: Site | None,
        site_out: Site | None = None,
        options: Mapping[str, object] | None = None,
    ) -> Dictionary:
        """Returns the dictionary.

        Args:
            activation: the nonlinearity.
            units: what the activations are measured in, for the record.
            site: where the input is read.
            site_out: where the reconstruction belongs, if elsewhere.
            options: further fields of the config: `norm`, `undo_norm`, `joins_heads`.
        """
        cfg = DictionaryConfig.model_validate(
            {
                "d_in": self.W_enc.shape[0],
                "d_sae": self.W_enc.shape[1],
                "d_out": self.W_dec.shape[1],
                "activation": activation,
                "site": site,
                "site_out": site_out,
                **(options or {}),
            }
        )
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return Dictionary(cfg, tensors | self.extra, source={"units": units})
