"""Where a dictionary of any class reads and writes, as sites in the order of its layers."""

from saekit.errors import ConfigError
from saekit.sae.base import SAE
from saekit.sae.dictionary import Dictionary
from saekit.sae.multilayer import MultiLayerDictionary
from saekit.sae.site import Site, parse_site
from saekit.sae.temporal import TemporalDictionary

__all__ = ["sites_in", "sites_out"]


def sites_in(sae: SAE) -> tuple[Site, ...]:
    """Returns where the dictionary reads: one site, or one for each layer.

    Raises:
        ConfigError: its release does not say.
    """
    match sae:
        case MultiLayerDictionary():
            sites = sae.cfg.sites
        case Dictionary() | TemporalDictionary():
            sites = None if sae.cfg.site is None else (sae.cfg.site,)
        case _:
            sites = None
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
    match sae:
        case MultiLayerDictionary() if sae.cfg.sites_out is not None:
            return sae.cfg.sites_out
        case Dictionary() if sae.cfg.site_out is not None:
            return (sae.cfg.site_out,)
    target = sae.source.get("target_hook_point")
    return (parse_site(target),) if isinstance(target, str) else sites_in(sae)


def _named(sae: SAE) -> str:
    ref = sae.source.get("ref")
    return f"dictionary {ref!r}" if ref else "dictionary"
