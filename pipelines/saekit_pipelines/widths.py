"""What a recipe leaves to the store that an SAE is trained on: widths, and the number of hook points."""

from collections.abc import Mapping

from saekit.activations import ActivationStore, JoinedStore, PairedStore
from saekit.errors import ConfigError
from saekit.manifest import Manifest
from saekit.sae import SAEConfig, SitesConfig, TranscoderConfig

__all__ = ["sized", "taken_from_store"]


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
