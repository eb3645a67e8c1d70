"""What dictionaries of several hook points share: the hook point is an axis of their activations, the last but one."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.base import SAE, SAEConfig

__all__ = ["SitesConfig", "SitesSAE"]


class SitesConfig(SAEConfig):
    """A dictionary of activations of equal width at several hook points, its sites."""

    num_sites: int = Field(default=0, ge=0)
    """Hook points; 0 = not known yet (a recipe leaves it to the hook points that it names)."""

    @field_validator("num_sites")
    @classmethod
    def _several(cls, value: int) -> int:
        if value == 1:
            raise ValueError("needs at least 2 hook points")
        return value

    def with_num_sites(self, num_sites: int) -> Self:
        """Returns the config for so many hook points.

        Raises:
            ConfigError: the config already names another number, or it is 1.
        """
        if self.num_sites not in {0, num_sites}:
            raise ConfigError(
                f"sae: num_sites is {self.num_sites}, needs the number of hook points {num_sites}; leave it out to take it"
            )
        return type(self).parse(self.to_dict() | {"num_sites": num_sites}, where="sae")


class SitesSAE(SAE):
    """A dictionary of S hook points: x is [..., S, d_in], or [..., S * d_in] with the hook points side by side.

    Every site is centred and scaled by itself in training. Activations of different sites have no unit in common, so those of
    the features are the ones of normalised sites, where E||x|| = sqrt(d_in) at each.

    Attributes:
        site_scale: [S], what each site's centred activations were multiplied by in training; 1 before.
        hook_point: the sites, separated by commas; None when unknown.
    """

    cfg: SitesConfig
    site_scale: nn.Parameter

    def __init__(
        self,
        cfg: SitesConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes a dictionary with tied random directions, the same at every site.

        Raises:
            ConfigError: the config does not say d_in or num_sites.
        """
        if cfg.num_sites < 2:
            raise ConfigError(
                f"sae: num_sites is {cfg.num_sites}, needs the number of hook points; use cfg.with_num_sites(number)"
            )
        super().__init__(cfg, seed=seed, hook_point=hook_point, source=source, dtype=dtype)
        kept = torch.promote_types(dtype, torch.float32)
        self.site_scale = nn.Parameter(torch.ones(cfg.num_sites, dtype=kept), requires_grad=False)

    @property
    def num_sites(self) -> int:
        """S, hook points."""
        return self.cfg.num_sites

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The sites in order; empty when unknown."""
        return tuple(self.hook_point.split(",")) if self.hook_point else ()

    @property
    def hook_point_out(self) -> str | None:
        """The last site, the nearest to the model's output."""
        return self.hook_points[-1] if self.hook_points else None

    def site_rows(self, x: Tensor) -> Tensor:
        """Returns x as [N, S, d_in] in the dictionary's dtype.

        Raises:
            ConfigError: `x` has other last axes.
        """
        sites, width = self.num_sites, self.d_in
        if tuple(x.shape[-2:]) != (sites, width) and (x.ndim == 0 or x.shape[-1] != sites * width):
            where = f"sae of {self.hook_point!r}" if self.hook_point else "sae"
            raise ConfigError(
                f"{where}: x has shape {list(x.shape)}, needs [..., {sites}, {width}] (hook point, width)"
                f" or [..., {sites * width}]"
            )
        return x.reshape(-1, sites, width).to(self.W_enc.dtype)

    def outer_shape(self, x: Tensor) -> torch.Size:
        """Returns the leading axes of x, those before hook point and width."""
        return x.shape[:-2] if tuple(x.shape[-2:]) == (self.num_sites, self.d_in) else x.shape[:-1]

    @abstractmethod
    def fold_sites(self, mean: Tensor, scale: Tensor) -> None:
        """Turns a dictionary of sites normalised to `(x - mean) * scale` into the same one of raw sites, in place.

        Args:
            mean: [S, d_in] float64.
            scale: [S] float64.
        """

    @abstractmethod
    def unfold_sites(self, mean: Tensor, scale: Tensor) -> None:
        """The inverse of `fold_sites`."""
