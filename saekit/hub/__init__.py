"""From a reference to an SAE."""

from saekit.hub.resolve import load_sae

__all__ = ["load_sae"]
