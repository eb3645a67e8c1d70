"""One question to a labelling model and its answer, and what a client of any server must be able to do."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field, JsonValue, model_validator

from saekit.config import Config
from saekit.errors import LabelerError

__all__ = ["ChatClient", "ChatReply", "ChatRequest", "LLMConfig", "RequestFailedError"]

CHARACTERS_PER_TOKEN = 3.0
"""Fewer than English has under any usual tokenizer (about 4), so that caps are kept from the safe side."""


class LLMConfig(Config):
    """An OpenAI-compatible server, how to ask it, and what it may cost."""

    model: str
    """Name of the model as the server knows it."""
    base_url: str | None = None
    """Address up to `/v1`; None: OpenAI's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a server with a `base_url` may need none."""
    max_features: int | None = Field(default=200, ge=1)
    """Explain so many of the labelled features that fire, those whose token rules explain least first; None: all."""
    num_top: int = Field(default=10, ge=1)
    """Strongest contexts shown to the explainer."""
    num_sample: int = Field(default=10, ge=0)
    """Contexts over the whole range of activations shown to the explainer."""
    num_effects: int = Field(default=15, ge=0)
    """Promoted and suppressed tokens shown to the explainer."""
    num_judged: int = Field(default=10, ge=0)
    """Held-out texts on which the feature fires that the judge sees, beside as many on which it does not; 0: no judging."""
    judge_lexical: bool = False
    """Whether the judge also scores the lexical labels of the explained features."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the answers; left out where the server refuses it."""
    seed: int = Field(default=0, ge=0)
    """Of the shown and judged contexts."""
    max_output_tokens: int = Field(default=600, ge=16)
    """Length of one answer; an answer that was cut off is asked again with twice as many."""
    attempts: int = Field(default=2, ge=1)
    """Times that a feature is asked about before it counts as failed."""
    concurrency: int = Field(default=16, ge=1)
    """Requests in flight."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """For one request."""
    max_retries: int = Field(default=6, ge=0)
    """Repeats of one request after server or connection errors; waiting for a rate limit does not count."""
    wait_seconds: float = Field(default=1.0, ge=0)
    """First pause before a repeat, doubled each time, where the server names none."""
    max_wait_seconds: float = Field(default=60.0, ge=0)
    """Longest pause; a server that asks for a longer one is obeyed up to ten times this."""
    max_requests: int | None = Field(default=None, ge=1)
    """Hard cap on requests sent for this folder, repeats and former runs included."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Hard cap on input and output tokens for this folder, counting the most that requests in flight may take."""
    max_cost: float | None = Field(default=None, gt=0)
    """Hard cap on cost, in the currency of the prices."""
    price_input: float | None = Field(default=None, ge=0)
    """Per million input tokens."""
    price_output: float | None = Field(default=None, ge=0)
    """Per million output tokens."""

    @model_validator(mode="after")
    def _cap_has_prices(self) -> "LLMConfig":
        if self.max_cost is not None and (self.price_input is None or self.price_output is None):
            raise ValueError("max_cost needs price_input and price_output, per million tokens")
        return self

    def cost(self, input_tokens: float, output_tokens: float) -> float | None:
        """Returns what so many tokens cost; None without prices."""
        if self.price_input is None or self.price_output is None:
            return None
        return (input_tokens * self.price_input + output_tokens * self.price_output) / 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """One question, complete: equal requests have equal keys in every process."""

    model: str
    system: str
    """Fixed part of the prompt: first, so that servers can keep it from request to request."""
    user: str
    schema_name: str
    schema: Mapping[str, JsonValue]
    """JSON schema of the answer."""
    temperature: float
    max_output_tokens: int
    attempt: int = 0
    """Asked again for want of a usable answer: another key in the ledger."""

    def key(self) -> str:
        """Returns the sha256 of everything that the answer depends on."""
        values = {
            "model": self.model,
            "messages": [self.system, self.user],
            "schema": [self.schema_name, dict(self.schema)],
            "temperature": self.temperature,
            "max_output_tokens": self.max_output_tokens,
            "attempt": self.attempt,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def estimated_input_tokens(self) -> int:
        """Returns an upper guess of the prompt's tokens from its length."""
        return int((len(self.system) + len(self.user)) / CHARACTERS_PER_TOKEN) + 50


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatReply:
    """What the server said."""

    text: str
    """Empty where the server sent no content or a refusal."""
    finish_reason: str
    """`stop`, `length`, ... as the server put it."""
    input_tokens: int
    output_tokens: int
    is_estimated: bool = False
    """The server sent no usage, so the tokens are guessed from lengths."""


class RequestFailedError(LabelerError):
    """One request cannot be answered; others may."""


class ChatClient(Protocol):
    """Talks to one server."""

    async def complete(self, request: ChatRequest, *, on_send: Callable[[], None]) -> ChatReply:
        """Returns the answer; `on_send` is called before every single HTTP request and may raise to forbid it.

        Raises:
            RequestFailedError: this request is refused or fails on the server.
            LabelerError: no request can be answered: key, quota, rate limit without end, no connection.
        """

    async def close(self) -> None:
        """Lets go of connections; a later `complete` opens new ones."""
