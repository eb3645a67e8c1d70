"""Widths and numbers of hook points: those that a recipe names, and those that it leaves to the store."""

from collections.abc import Mapping, Sequence

import torch

from saekit.activations import ActivationStore, JoinedStore, PairedStore
from saekit.errors import ConfigError
from saekit.manifest import Manifest
from saekit.models import LanguageModel, capture
from saekit.sae import SAEConfig, SitesConfig, TranscoderConfig

__all__ = ["check_width", "sized", "taken_from_store"]


def check_width(lm: LanguageModel, hook_points: Sequence[str], d_in: int, *, where: str) -> None:
    """Checks by one forward of one token that the hook points are `d_in` wide.

    Raises:
        ConfigError: one is not; the line begins with `where`.
    """
    one_token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    for hook_point, hidden in capture(lm, one_token, hook_points).items():
        width = hidden.shape[-1]
        if d_in != width:
            raise ConfigError(
                f"{where}: found {d_in}, {hook_point!r} of {lm.name!r} is {width} wide; leave d_in out to take it"
            )


def sized(cfg: SAEConfig, store: ActivationStore) -> SAEConfig:
    """Returns the config with the widths of the store that it is trained on.

    Raises:
        ConfigError: it names others, or the store's hook points differ in theirs.
    """
    if isinstance(cfg, TranscoderConfig) and isinstance(store, PairedStore):
        return cfg.with_d_in(store.inputs.d_in).with_d_out(store.targets.d_in)
    if isinstance(cfg, SitesConfig) and isinstance(store, JoinedStore):
        return cfg.with_num_sites(len(store.stores)).with_d_in(_common_width(store))
    return cfg.with_d_in(store.d_in)


def taken_from_store(sae: Mapping[str, object], manifest: Manifest) -> dict[str, object]:
    """Returns what `sized` filled in of a recipe's SAE, as the manifest of its training has it."""
    trained = manifest.config.get("sae")
    found = trained if isinstance(trained, dict) else {}
    return {key: found.get(key) for key in ("d_in", "d_out", "num_sites") if sae.get(key) == 0}


def _common_width(store: JoinedStore) -> int:
    widths = {each.hook_point: each.d_in for each in store.stores}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ConfigError(f"hook_points: widths differ ({found}), needs hook points of one width")
    return store.stores[0].d_in
