"""Predicted activations, read from what a judge wrote or would write: expectations where it says how likely each number is.

Source: Bills et al. 2023 (Language models can explain neurons in language models), "expected value": the sum of v p(v) over the
numbers among the likeliest tokens, divided by the sum of their p.
"""

import re
from collections.abc import Mapping, Sequence

from saekit.labelling.answers import THOUGHTS_END
from saekit.labelling.chat import ChatReply
from saekit.labelling.logprobs import TokenLogprob

__all__ = ["LEVELS", "PLACEHOLDER", "read_placeholders", "written_values"]

LEVELS = tuple(str(level) for level in range(11))
PLACEHOLDER = "\t?"
"""Behind a token whose activation is to be predicted. No word: a word draws the tab before it into its first token."""
_ENTRY = re.compile(r'"(\d+)"\s*:\s*"?(\d+(?:\.\d+)?)(?![\d.])')


def written_values(reply: ChatReply, num: int) -> dict[int, float]:
    """Returns token (from 0) -> its predicted activation in 0 .. 10, from an answer `{"1": 0, "2": 7}`.

    Bare, fenced, or cut off. Tokens with no number, one out of range, or two different ones are left out. Each number is replaced
    by its expectation where the answer's logprobs show its digits.
    """
    start = reply.text.rfind(THOUGHTS_END) + 1
    starts = _starts(reply.text, reply.logprobs)
    said: dict[int, set[float]] = {}
    expected: dict[int, float] = {}
    for entry in _ENTRY.finditer(reply.text, start):
        place, value = int(entry[1]) - 1, float(entry[2])
        # The last number of an answer that was cut off may have lost a digit.
        is_cut = entry.end() == len(reply.text.rstrip())
        if not 0 <= place < num or is_cut:
            continue
        said.setdefault(place, set()).add(value)
        expected[place] = _expectation(reply.logprobs, starts, entry.start(2), entry[2])
    return {
        place: expected[place]
        for place, values in said.items()
        if len(values) == 1 and 0 <= next(iter(values)) <= len(LEVELS) - 1
    }


def read_placeholders(logprobs: Sequence[TokenLogprob], num: int) -> dict[int, float]:
    """Returns token (from 0) -> the expectation at its placeholder in a text that was read.

    Placeholders are found in the model's own tokens, whose borders need not be those of the subject's. None is used where there
    are not `num` of them; those without a number among the likeliest tokens are left out.
    """
    text, starts = "".join(token.text for token in logprobs), _starts_of(logprobs)
    places = [found.end() - 1 for found in re.finditer(re.escape(PLACEHOLDER), text)]
    if len(places) != num:
        return {}
    found = {}
    for number, place in enumerate(places):
        at = starts.get(place)
        shares = {} if at is None else logprobs[at].choices
        if sum(shares.values()) > 0:
            found[number] = _mean(shares)
    return found


def _starts(text: str, logprobs: Sequence[TokenLogprob]) -> dict[int, int]:
    """Returns place in the text -> token that begins there; nothing where the tokens are not those of the text."""
    joined = "".join(token.text for token in logprobs)
    # Some servers list the token that ends the answer too, others stop short of the end.
    return _starts_of(logprobs) if joined and (joined.startswith(text) or text.startswith(joined)) else {}


def _starts_of(logprobs: Sequence[TokenLogprob]) -> dict[int, int]:
    starts, at = {}, 0
    for number, token in enumerate(logprobs):
        if token.text:
            # A token with a space or quote before its number is found by the number.
            starts[at] = number
            starts[at + len(token.text) - len(token.text.lstrip(' \t\n":,{'))] = number
        at += len(token.text)
    return starts


def _expectation(logprobs: Sequence[TokenLogprob], starts: Mapping[int, int], place: int, written: str) -> float:
    at = starts.get(place)
    shares = dict(logprobs[at].choices) if at is not None else {}
    if at is None or sum(shares.values()) <= 0:
        return float(written)
    if "10" not in shares and "1" in shares and written in {"1", "10"} and at + 1 < len(logprobs):
        # Digit by digit: what follows the 1 tells 10 from 1.
        is_ten = min(logprobs[at + 1].choices.get("0", 0.0), 1.0)
        shares["10"], shares["1"] = shares["1"] * is_ten, shares["1"] * (1 - is_ten)
    return _mean(shares)


def _mean(shares: Mapping[str, float]) -> float:
    return sum(int(level) * share for level, share in shares.items()) / sum(shares.values())
