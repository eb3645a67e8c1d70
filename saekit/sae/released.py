"""Released dictionaries as folders of saekit's own: what `save` wrote of them, read back."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from saekit.errors import ConfigError, FormatError
from saekit.sae.base import SAE
from saekit.sae.dictionary import Dictionary, DictionaryConfig
from saekit.sae.lorsa import LorsaConfig, LorsaDictionary
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.temporal import TemporalConfig, TemporalDictionary

__all__ = ["RELEASED_KINDS", "build_released"]

RELEASED_KINDS = frozenset({"dictionary", "lorsa", "multilayer", "temporal"})
"""`kind` of the configs that `build_released` takes."""

_Config = DictionaryConfig | LorsaConfig | MultiLayerConfig | TemporalConfig
_AnyConfig = Annotated[_Config, Field(discriminator="kind")]


def build_released(header: Mapping[str, object], tensors: Mapping[str, Tensor], *, where: str) -> SAE:
    """Returns the dictionary that a saekit folder's `cfg.json` and weights describe.

    Args:
        header: the content of `cfg.json`.
        tensors: the content of `sae.safetensors`.
        where: names the folder in messages.

    Raises:
        FormatError: the config is not one of these kinds, or the weights do not fit it.
    """
    source = header.get("source")
    origin = source if isinstance(source, dict) else None
    adapter: TypeAdapter[_Config] = TypeAdapter(_AnyConfig)
    try:
        match adapter.validate_python(header.get("sae")):
            case DictionaryConfig() as config:
                return Dictionary(config, tensors, source=origin)
            case LorsaConfig() as config:
                return LorsaDictionary(config, tensors, source=origin)
            case MultiLayerConfig() as config:
                return MultiLayerDictionary(config, tensors, source=origin)
            case TemporalConfig() as config:
                return TemporalDictionary(config, tensors, source=origin)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["sae", *(str(part) for part in first["loc"])])
        raise FormatError(f"{where}: {key}: {first['msg']}, needs a config of this version") from error
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from error
