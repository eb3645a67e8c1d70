"""What writers of every format need: refusals in one wording, and what a dictionary's record says of its model."""

from collections.abc import Mapping

from saekit.errors import ConfigError
from saekit.sae.dictionary import Dictionary

__all__ = ["inexpressible", "is_transcoder", "model_name"]


def inexpressible(target: str, what: str) -> ConfigError:
    """Returns the error that refuses an export."""
    return ConfigError(f"export: {target} cannot express {what}, needs a dictionary without it")


def is_transcoder(sae: Dictionary) -> bool:
    """Whether the dictionary writes elsewhere than it reads, or has a skip connection."""
    return sae.W_skip is not None or sae.d_in != sae.d_out or sae.cfg.site_out not in {None, sae.cfg.site}


def model_name(source: Mapping[str, object]) -> str | None:
    """Returns the model that a dictionary's record names, its own or that of the peer's config."""
    records = [source, source.get("metadata")]
    while records:
        record = records.pop(0)
        if isinstance(record, dict):
            for key in ("model_name", "base_model", "lm_name", "model"):
                if isinstance(record.get(key), str):
                    return str(record[key])
            records += [value for key, value in record.items() if key != "files"]
    return None
