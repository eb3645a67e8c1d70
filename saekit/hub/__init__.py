"""From a reference to a dictionary, whoever released it."""

from saekit.hub.export import save_sae
from saekit.hub.resolve import load_sae, load_saes

__all__ = ["load_sae", "load_saes", "save_sae"]
