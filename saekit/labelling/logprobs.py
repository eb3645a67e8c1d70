"""How likely a model found tokens, as servers report it: of what it wrote, or of a text that it only read.

Shapes: n tokens.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

__all__ = ["TokenLogprob", "dump_logprobs", "load_logprobs", "of_answer", "of_prompt", "of_prompt_echoed", "pooled"]

_AROUND = ' \t\r\n":,{}[]'
"""What tokenizers draw into one token with a short answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """One token."""

    text: str
    logprob: float | None
    """Natural logarithm of its probability where it stands; None for a first token, and where the server gave no number."""
    choices: Mapping[str, float] = field(default_factory=dict)
    """Probability of each short answer of interest in its place, as far as the server listed it."""


def pooled(alternatives: Iterable[tuple[str, float]], choices: Collection[str]) -> dict[str, float]:
    """Returns choice -> probability, summed over the alternatives that differ from it in spaces, quotes and commas only.

    Args:
        alternatives: (token, natural logarithm of its probability).
    """
    found: dict[str, float] = {}
    for text, logprob in alternatives:
        bare = text.strip(_AROUND)
        if bare in choices and not math.isnan(logprob):
            found[bare] = found.get(bare, 0.0) + math.exp(min(logprob, 0.0))
    # As the ledger keeps it, so that an answer found there is the one that came.
    return {choice: round(share, 6) for choice, share in found.items()}


def of_answer(choice: Mapping[str, JsonValue], choices: Collection[str]) -> tuple[TokenLogprob, ...]:
    """Returns the tokens of a chat completion's choice; none where the server gave none, or what it gave cannot be read."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = []
    for entry in content if isinstance(content, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
            return ()
        top = entry.get("top_logprobs")
        listed = [
            (str(one.get("token")), _number(one.get("logprob")))
            for one in (top if isinstance(top, list) else [])
            if isinstance(one, dict)
        ]
        found.append(_token(entry["token"], entry.get("logprob"), listed, choices))
    return tuple(found)


def of_prompt_echoed(
    choice: Mapping[str, JsonValue], choices: Collection[str], *, num_prompt: int | None
) -> tuple[TokenLogprob, ...]:
    """Returns the tokens of the prompt from a completion that was asked to `echo` it; none where there are none.

    Args:
        num_prompt: tokens of the prompt; None: all but the last one, which was written.
    """
    logprobs = choice.get("logprobs")
    logprobs = logprobs if isinstance(logprobs, dict) else {}
    tokens, numbers, tops = (logprobs.get(key) for key in ("tokens", "token_logprobs", "top_logprobs"))
    if not isinstance(tokens, list) or not isinstance(numbers, list) or len(tokens) != len(numbers):
        return ()
    listed = tops if isinstance(tops, list) and len(tops) == len(tokens) else [None] * len(tokens)
    return tuple(
        _token(text, number, _listed(top), choices)
        for text, number, top in list(zip(tokens, numbers, listed, strict=True))[
            : len(tokens) - 1 if num_prompt is None else num_prompt
        ]
    )


def of_prompt(choice: Mapping[str, JsonValue], choices: Collection[str]) -> tuple[TokenLogprob, ...]:
    """Returns the tokens of the prompt from `prompt_logprobs`, vLLM's own; none where there are none."""
    positions = choice.get("prompt_logprobs")
    found = []
    for position in positions if isinstance(positions, list) else []:
        entries = [one for one in position.values() if isinstance(one, dict)] if isinstance(position, dict) else []
        listed = [(str(one.get("decoded_token")), _number(one.get("logprob"))) for one in entries]
        # The token itself stands first, then the likeliest.
        text, number = listed[0] if listed else ("", None)
        found.append(_token(text, number, listed, choices))
    return tuple(found)


def _token(
    text: JsonValue, number: JsonValue, listed: Iterable[tuple[str, float]], choices: Collection[str]
) -> TokenLogprob:
    logprob = _number(number)
    return TokenLogprob(
        text=str(text), logprob=round(logprob, 5) if math.isfinite(logprob) else None, choices=pooled(listed, choices)
    )


def _listed(top: JsonValue) -> list[tuple[str, float]]:
    return [(text, _number(number)) for text, number in top.items()] if isinstance(top, dict) else []


def _number(value: JsonValue) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]  # checked in the line above


def dump_logprobs(logprobs: Sequence[TokenLogprob]) -> str:
    """Returns tokens as text for the ledger; empty where there are none."""
    if not logprobs:
        return ""
    rows = [[t.text, t.logprob, dict(t.choices)] for t in logprobs]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":"))


def load_logprobs(text: str) -> tuple[TokenLogprob, ...]:
    """Returns what `dump_logprobs` wrote."""
    return tuple(
        TokenLogprob(text=token, logprob=logprob, choices=choices)
        for token, logprob, choices in (json.loads(text) if text else [])
    )
