"""What writers of every format need: refusals in one wording."""

from saekit.errors import ConfigError

__all__ = ["inexpressible"]


def inexpressible(target: str, what: str) -> ConfigError:
    """Returns the error that refuses an export."""
    return ConfigError(f"export: {target} cannot express {what}, needs a dictionary without it")
