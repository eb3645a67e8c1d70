"""Widths that a recipe leaves to the cache."""

from saekit.activations import ActivationStore, PairedStore
from saekit.manifest import Manifest
from saekit.sae import SAEConfig, TranscoderConfig

__all__ = ["recorded_width", "sized"]


def recorded_width(manifest: Manifest, key: str) -> object:
    """Returns the width `d_in` or `d_out` that an SAE's folder was trained with; None where it says none."""
    sae = manifest.config.get("sae")
    return sae.get(key) if isinstance(sae, dict) else None


def sized(cfg: SAEConfig, store: ActivationStore) -> SAEConfig:
    """Returns the config with the widths of the store that it is trained on."""
    if isinstance(cfg, TranscoderConfig) and isinstance(store, PairedStore):
        return cfg.with_d_in(store.inputs.d_in).with_d_out(store.targets.d_in)
    return cfg.with_d_in(store.d_in)
