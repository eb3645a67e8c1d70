"""Where a dictionary of any class reads and writes, as sites in the order of its layers."""

from typing import Literal

from saekit.errors import ConfigError
from saekit.sae.base import SAE
from saekit.sae.multilayer import MultiLayerDictionary
from saekit.sae.site import Site, parse_site
from saekit.sae.sites import SitesSAE

__all__ = ["num_places", "sites_in", "sites_out"]


def num_places(sae: SAE) -> int:
    """Returns at how many places the dictionary reads."""
    match sae:
        case MultiLayerDictionary():
            return sae.cfg.num_layers_in
        case SitesSAE():
            return sae.num_sites
        case _:
            return 1


def sites_in(sae: SAE) -> tuple[Site, ...]:
    """Returns where the dictionary reads: one site, or one for each layer.

    Raises:
        ConfigError: its release does not say.
    """
    sites = _configured(sae, "site")
    if sites is None and sae.hook_point is not None:
        sites = tuple(parse_site(point) for point in sae.hook_point.split(","))
    if sites is None:
        raise ConfigError(
            f"{_named(sae)}: its files do not say where it reads, needs a hook point; load_sae(..., hook_point='model.layers.3')"
        )
    return sites


def sites_out(sae: SAE) -> tuple[Site, ...]:
    """Returns where the dictionary's reconstruction belongs: where it reads, but for transcoders.

    Raises:
        ConfigError: its release says neither.
    """
    sites = _configured(sae, "site_out")
    target = sae.source.get("target_hook_point")
    if sites is None and isinstance(target, str):
        sites = (parse_site(target),)
    return sites_in(sae) if sites is None else sites


def _configured(sae: SAE, name: Literal["site", "site_out"]) -> tuple[Site, ...] | None:
    """What the config says: `site` of one, `sites` of several layers; those that we train have neither."""
    one, several = getattr(sae.cfg, name, None), getattr(sae.cfg, name.replace("site", "sites"), None)
    return (one,) if isinstance(one, Site) else several


def _named(sae: SAE) -> str:
    ref = sae.source.get("ref")
    return f"dictionary {ref!r}" if ref else "dictionary"
