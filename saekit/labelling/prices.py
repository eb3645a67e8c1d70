"""What a labelling model charges: the package's table, `prices.toml`, by host and model."""

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from urllib.parse import urlparse

__all__ = ["Prices", "known_prices"]

_OPENAI_HOST = "api.openai.com"
_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Dollars per million tokens."""

    input: float
    output: float
    cached_input: float
    """For the part of a prompt that the server kept from an earlier request."""
    batch_factor: float = 1.0
    """What a request costs in the Batch API, as a share of its price."""

    def cost(self, input_tokens: float, output_tokens: float, *, cached_tokens: float = 0.0) -> float:
        """Returns what so many tokens cost; `cached_tokens` are among the input."""
        fresh = input_tokens - cached_tokens
        return (fresh * self.input + cached_tokens * self.cached_input + output_tokens * self.output) / 1e6


def known_prices(model: str, base_url: str | None) -> Prices | None:
    """Returns the table's prices of a model, dated snapshots included; None for a host or a model that it does not have.

    Args:
        base_url: None: OpenAI's own.
    """
    host = urlparse(base_url).hostname if base_url else _OPENAI_HOST
    for table in _tables():
        if table["host"] == host:
            row = table["models"].get(_SNAPSHOT.sub("", model))
            return None if row is None else Prices(**row, batch_factor=table["batch_factor"])
    return None


@functools.cache
def _tables() -> list[dict]:  # type: ignore[type-arg] # rows of a file of our own, checked by its test
    text = (resources.files("saekit.labelling") / "prices.toml").read_text(encoding="utf-8")
    return list(tomllib.loads(text).values())
