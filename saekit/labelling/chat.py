"""One question to a labelling model and its answer, and what talks to such a model must be able to do."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from pydantic import JsonValue

from saekit.errors import LabelerError
from saekit.labelling.logprobs import TokenLogprob

if TYPE_CHECKING:
    from saekit.labelling.ledger import Ledger

__all__ = ["Answer", "Ask", "ChatClient", "ChatReply", "ChatRequest", "Desk", "SpentError"]

BYTES_PER_TOKEN = 3.0
"""Fewer than text has under any usual tokenizer (English about 4), so that caps are kept from the safe side."""


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
    """Asked again for want of a usable answer, or one sample of several: another key in the ledger."""
    seed: int | None = None
    """Of the sampling, for servers that take one; None: theirs."""
    purpose: str = ""
    """Kind of question, for the ledger's sums: `explain:raw`, `judge`, ...; not part of the key."""
    feature: int = -1
    """Which feature is asked about, for its cost; not part of the key."""
    choices: tuple[str, ...] = ()
    """Short answers whose probabilities are wanted at every token, where the server gives logprobs."""
    reads: bool = False
    """Nothing is to be written: the model reads `user`, and the answer is how likely it found each token of it."""
    usual_answer: str = ""
    """An answer of the usual length, for estimates; not part of the key."""

    @classmethod
    def reading(cls, model: str, text: str, *, purpose: str, feature: int = -1) -> Self:
        """Returns what has a model read a text, and say nothing."""
        return cls(
            model=model,
            system="",
            user=text,
            schema_name="",
            schema={},
            temperature=0.0,
            max_output_tokens=1,
            reads=True,
            purpose=purpose,
            feature=feature,
        )

    def key(self) -> str:
        """Returns the sha256 of everything that the answer depends on."""
        values: dict[str, object] = {
            "model": self.model,
            "messages": [self.system, self.user],
            "schema": [self.schema_name, dict(self.schema)],
            "temperature": self.temperature,
            "max_output_tokens": self.max_output_tokens,
            "attempt": self.attempt,
            # Left out where there is none, so that keys of ledgers from before there were seeds stay what they are.
            **({} if self.seed is None else {"seed": self.seed}),
        }
        # Only where they say something, so that keys of other questions are what they were.
        values |= {"choices": list(self.choices)} if self.choices else {}
        values |= {"reads": True} if self.reads else {}
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def most_tokens(self) -> tuple[int, int]:
        """Returns an upper guess of its input tokens, from lengths alone, and the most that its answer may take."""
        num_bytes = len(self.system.encode()) + len(self.user.encode())
        return int(num_bytes / BYTES_PER_TOKEN) + 50, self.max_output_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatReply:
    """What the model said, and what that took."""

    text: str
    """Empty where the server sent no content or a refusal."""
    finish_reason: str
    """`stop`, `length`, ... as the server put it."""
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Input tokens that the server kept from an earlier request."""
    is_estimated: bool = False
    """The server sent no usage, so the tokens are guessed from lengths."""
    refusal: str = ""
    """Why the model would not answer, in its words."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Tokens of the answer, or of what was read; none where they were not wanted or the server gives none."""
    cost: float | None = None
    """In dollars, at the prices of the day it was paid; None without prices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How one request ended: exactly one of `reply` and `reason` is there."""

    request: ChatRequest
    reply: ChatReply | None = None
    reason: str = ""
    """Why there is no reply: refused by the server, or lost to errors more often than allowed."""


class SpentError(LabelerError):
    """A cap of the config is reached; raised before the request that would pass it.

    Attributes:
        may_fit_later: what is on its way may turn out to take less than it may.
    """

    def __init__(self, message: str, *, may_fit_later: bool = False) -> None:
        super().__init__(message)
        self.may_fit_later = may_fit_later


class Desk(Protocol):
    """What a client reports to; each call is on disk when it returns."""

    ledger: "Ledger"
    """Where it writes, for clients whose requests outlive the process."""

    def sending(self, request: ChatRequest, *, batch: str | None = None) -> None:
        """Before every single HTTP request, or before a batch with this request in it is created.

        Raises:
            SpentError: a cap forbids it.
            LabelerError: the run is ending, nothing more is to be sent.
        """

    def unanswered(self, request: ChatRequest, tokens: tuple[int, int] | None) -> None:
        """The request that was sent got no answer: `tokens` (input, output) charged, or None where nobody knows."""

    def answered(self, request: ChatRequest, reply: ChatReply) -> None:
        """The answer has arrived."""

    def failed(self, request: ChatRequest, reason: str) -> None:
        """There will be none."""

    def say(self, message: str) -> None:
        """Tells the user one fact."""


class ChatClient(Protocol):
    """Talks to one model."""

    async def answer(self, requests: Sequence[ChatRequest], desk: Desk) -> None:
        """Reports each request to `desk` as answered or failed, in any order.

        Raises:
            SpentError: a cap is reached; what was on its way has arrived.
            LabelerError: no request can be answered: key, quota, rate limit without end, no connection.
        """

    async def close(self) -> None:
        """Lets go of connections; a later `answer` opens new ones."""


class Ask(Protocol):
    """All that explainers and scorers know of a labelling model."""

    def ask(
        self, requests: Sequence[ChatRequest], *, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Returns one answer for each request, in their order; known ones come from the ledger and cost nothing.

        Args:
            on_answer: told of each as it arrives, in any order, so that results can be written at once.

        Raises:
            SpentError, LabelerError: the run cannot go on; what has arrived is kept, and asking again goes on from there.
        """
