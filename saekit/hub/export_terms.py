"""What writers of every format need: refusals in one wording, and what counts as a transcoder."""

from saekit.errors import ConfigError
from saekit.sae.dictionary import Dictionary

__all__ = ["inexpressible", "is_transcoder"]


def inexpressible(target: str, what: str) -> ConfigError:
    """Returns the error that refuses an export."""
    return ConfigError(f"export: {target} cannot express {what}, needs a dictionary without it")


def is_transcoder(sae: Dictionary) -> bool:
    """Whether the dictionary writes elsewhere than it reads, or has a skip connection."""
    return sae.W_skip is not None or sae.d_in != sae.d_out or sae.cfg.site_out not in {None, sae.cfg.site}
