"""Input normalisation of training, and how it is folded into the weights so that a saved SAE takes raw activations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saekit.errors import NonFiniteError
from saekit.sae.base import SAE
from saekit.sae.sites import SitesSAE
from saekit.sae.transcoder import Transcoder

__all__ = [
    "AnyNormalization",
    "Normalization",
    "PairNormalization",
    "SiteNormalization",
    "normalization_of_state",
    "normalization_state",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """`x' = (x - mean) * scale`, with scale = sqrt(d_in) / E||x - mean||.

    Subtracting the mean of the data removes most of the dead features; a common scale makes learning rates and bandwidths
    carry over from model to model. All nonlinearities are positively homogeneous, so the scale can leave through the biases
    and thresholds while W_enc and W_dec stay as they are: activations of the folded SAE are in raw units and its decoder
    keeps its unit rows.

    Source: Gao et al. 2024, appendix A (centring); Anthropic, "Circuits updates - January 2025" (E||x|| = sqrt(d_in)).
    """

    mean: Tensor
    """[d_in] float64."""
    scale: float
    """Multiplies the centred activations."""
    total_variance: float
    """E||x' - E x'||^2, the denominator of the fraction of variance unexplained."""

    @classmethod
    def from_moments(cls, mean: Tensor, *, mean_norm_centred: float, mean_square_centred: float) -> "Normalization":
        """Returns the normalisation of data with this mean, E||x - mean|| and E||x - mean||^2, all in raw units.

        Raises:
            NonFiniteError: a moment is not finite, or all activations are equal.
        """
        if not (bool(torch.isfinite(mean).all()) and math.isfinite(mean_square_centred) and mean_norm_centred > 0):
            raise NonFiniteError(
                f"activations: mean distance from their mean is {mean_norm_centred}, needs finite activations that vary"
            )
        scale = math.sqrt(mean.shape[0]) / mean_norm_centred
        return cls(mean=mean.double().cpu(), scale=scale, total_variance=mean_square_centred * scale**2)

    def apply(self, x: Tensor) -> Tensor:
        """Returns normalised activations of raw ones, in the dtype of `x`, at least float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x - self.mean.to(x)) * self.scale

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        """Turns an SAE of normalised activations into the same SAE of raw ones, in place.

        For all x: folded.encode(x) = sae.encode(x') / scale and folded(x).x_hat = mean + sae(x').x_hat / scale.
        """
        bias = sae.b_dec.double() / self.scale
        # An encoder that does not subtract b_dec still has to see centred input: the mean enters through its bias.
        sae.b_enc.copy_(sae.b_enc.double() / self.scale)
        sae.b_dec.copy_(bias + self.mean.to(bias))
        sae.scale_thresholds(1 / self.scale)
        if not sae.cfg.apply_b_dec_to_input:
            sae.shift_inputs(-self.mean.to(bias) @ sae.W_enc.double())

    @torch.no_grad()
    def unfold(self, sae: SAE) -> None:
        """The inverse of `fold`: turns an SAE of raw activations into the same SAE of normalised ones, in place."""
        if not sae.cfg.apply_b_dec_to_input:
            sae.shift_inputs(self.mean.to(sae.W_enc.device) @ sae.W_enc.double())
        sae.b_enc.copy_(sae.b_enc.double() * self.scale)
        sae.b_dec.copy_((sae.b_dec.double() - self.mean.to(sae.b_dec.device)) * self.scale)
        sae.scale_thresholds(self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairNormalization:
    """The normalisation of a transcoder's data: one of what it reads, one of what it predicts.

    Pairs are [N, d_in + d_out], the input first.
    """

    inputs: Normalization
    """Of what is read."""
    targets: Normalization
    """Of what is predicted."""

    @property
    def scale(self) -> float:
        """Multiplies the centred predicted activations."""
        return self.targets.scale

    @property
    def total_variance(self) -> float:
        """Of the normalised predicted activations."""
        return self.targets.total_variance

    def apply(self, pairs: Tensor) -> Tensor:
        """Returns normalised pairs of raw ones."""
        d_in = len(self.inputs.mean)
        return torch.cat([self.inputs.apply(pairs[:, :d_in]), self.targets.apply(pairs[:, d_in:])], dim=1)

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        """Turns a transcoder of normalised activations into the same one of raw ones, in place.

        The decoder keeps its unit rows, so activations become those of the predicted side: acts / targets.scale.
        """
        assert isinstance(sae, Transcoder), "pairs without a transcoder"
        ratio = self.inputs.scale / self.targets.scale
        mean = self.inputs.mean.to(sae.b_dec.device)
        sae.W_enc.copy_(sae.W_enc.double() * ratio)
        sae.b_enc.copy_(sae.b_enc.double() / self.targets.scale - mean @ sae.W_enc.double())
        sae.b_dec.copy_(sae.b_dec.double() / self.targets.scale + self.targets.mean.to(mean))
        if sae.W_skip is not None:
            sae.W_skip.copy_(sae.W_skip.double() * ratio)
            sae.b_dec.copy_(sae.b_dec.double() - mean @ sae.W_skip.double())

    @torch.no_grad()
    def unfold(self, sae: SAE) -> None:
        """The inverse of `fold`."""
        assert isinstance(sae, Transcoder), "pairs without a transcoder"
        ratio = self.inputs.scale / self.targets.scale
        mean = self.inputs.mean.to(sae.b_dec.device)
        if sae.W_skip is not None:
            sae.b_dec.copy_(sae.b_dec.double() + mean @ sae.W_skip.double())
            sae.W_skip.copy_(sae.W_skip.double() / ratio)
        sae.b_dec.copy_((sae.b_dec.double() - self.targets.mean.to(mean)) * self.targets.scale)
        sae.b_enc.copy_((sae.b_enc.double() + mean @ sae.W_enc.double()) * self.targets.scale)
        sae.W_enc.copy_(sae.W_enc.double() / ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteNormalization:
    """The normalisation of activations at several hook points, each by itself or all by one.

    Rows are [N, S * d_in], the hook points side by side.
    """

    sites: tuple[Normalization, ...]
    """Of each hook point in order; all the same where they share one."""
    total_variance: float
    """Of what one sample reconstructs: of all hook points together, or of one of them on average."""

    @property
    def scale(self) -> list[float]:
        """What multiplies the centred activations of each hook point."""
        return [site.scale for site in self.sites]

    def apply(self, x: Tensor) -> Tensor:
        """Returns normalised rows of raw ones."""
        width = len(self.sites[0].mean)
        parts = torch.split(x, width, dim=1)
        return torch.cat([site.apply(part) for site, part in zip(self.sites, parts, strict=True)], dim=1)

    def fold(self, sae: SAE) -> None:
        """Turns a dictionary of normalised activations into the same one of raw ones, in place."""
        assert isinstance(sae, SitesSAE), "several hook points without a dictionary of several"
        sae.fold_sites(*self._moments())

    def unfold(self, sae: SAE) -> None:
        """The inverse of `fold`."""
        assert isinstance(sae, SitesSAE), "several hook points without a dictionary of several"
        sae.unfold_sites(*self._moments())

    def _moments(self) -> tuple[Tensor, Tensor]:
        mean = torch.stack([site.mean for site in self.sites])
        return mean, torch.tensor(self.scale, dtype=torch.float64)


AnyNormalization = Normalization | PairNormalization | SiteNormalization


def normalization_state(normalization: AnyNormalization) -> dict[str, object]:
    """Returns a normalisation as tensors and plain values."""
    if isinstance(normalization, PairNormalization):
        return {"pair": [normalization_state(each) for each in (normalization.inputs, normalization.targets)]}
    if isinstance(normalization, SiteNormalization):
        sites = [normalization_state(site) for site in normalization.sites]
        return {"sites": sites, "total_variance": normalization.total_variance}
    return {
        "mean": normalization.mean,
        "scale": normalization.scale,
        "total_variance": normalization.total_variance,
    }


def normalization_of_state(state: Mapping[str, Any]) -> AnyNormalization:
    """Returns the normalisation that `normalization_state` wrote down."""
    if "pair" in state:
        inputs, targets = (Normalization(**each) for each in state["pair"])
        return PairNormalization(inputs=inputs, targets=targets)
    if "sites" in state:
        sites = tuple(Normalization(**site) for site in state["sites"])
        return SiteNormalization(sites=sites, total_variance=state["total_variance"])
    return Normalization(**state)
