"""From a reference to a dictionary, whoever released it."""

from saekit.hub.convert import convert_sae
from saekit.hub.export import save_sae
from saekit.hub.resolve import load_sae, load_saes

__all__ = ["convert_sae", "load_sae", "load_saes", "save_sae"]
