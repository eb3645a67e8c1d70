"""From a reference to a dictionary, whoever released it; and back, to other libraries' formats and to the hub.

Names are loaded on first use: what is known of the releases needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saekit.hub.convert import convert_sae
    from saekit.hub.export import save_sae
    from saekit.hub.info import DictionaryInfo, dictionary_info
    from saekit.hub.publish import PushPlan, plan_push, push
    from saekit.hub.registry import Entry, known_entries
    from saekit.hub.resolve import load_sae, load_saes
    from saekit.hub.retrieval import pull

_HOME_OF = {
    "DictionaryInfo": "info",
    "Entry": "registry",
    "PushPlan": "publish",
    "convert_sae": "convert",
    "dictionary_info": "info",
    "known_entries": "registry",
    "load_sae": "resolve",
    "load_saes": "resolve",
    "plan_push": "publish",
    "pull": "retrieval",
    "push": "publish",
    "save_sae": "export",
}

__all__ = [
    "DictionaryInfo",
    "Entry",
    "PushPlan",
    "convert_sae",
    "dictionary_info",
    "known_entries",
    "load_sae",
    "load_saes",
    "plan_push",
    "pull",
    "push",
    "save_sae",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'saekit.hub' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"saekit.hub.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
