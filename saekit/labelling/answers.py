"""Reads JSON out of what a language model wrote: bare, fenced, with talk or thoughts around it, or cut off."""

import json
import math
import re
from collections.abc import Callable
from importlib import resources

from pydantic import JsonValue

__all__ = [
    "THOUGHTS_END",
    "UnusableAnswerError",
    "parse_object",
    "plain_text",
    "prompt_template",
    "share",
    "whole_number",
]

_LOOSE_COMMA = re.compile(r",(\s*[}\]])")
THOUGHTS_END = "</think>"


class UnusableAnswerError(Exception):
    """An answer that holds no object of the needed form; its message says why, for the record of a failure."""


def prompt_template(name: str) -> str:
    """Returns the text of a prompt file such as `explain_v2`; a changed text gets a new name, as labels carry it."""
    return (resources.files("saekit.labelling") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def parse_object(text: str, *, needs: str, is_cut: bool = False) -> dict[str, JsonValue]:
    """Returns the first JSON object in `text` that has the key `needs`.

    Args:
        is_cut: the text ends before its end: an object that is not closed is read up to its last whole value.

    Raises:
        UnusableAnswerError: there is none.
    """
    text = text.rpartition(THOUGHTS_END)[2]
    for candidate in (text, _LOOSE_COMMA.sub(r"\1", text)):
        found = _first_object(candidate, needs)
        if found is None and is_cut:
            found = _cut_object(candidate, needs)
        if found is not None:
            return found
    shown = " ".join(text.split())[:80]
    raise UnusableAnswerError(f"no JSON object with {needs!r} in {shown!r}" if shown else "empty answer")


def _first_object(text: str, needs: str) -> dict[str, JsonValue] | None:
    # Not strict: models put line breaks into strings.
    decoder = json.JSONDecoder(parse_constant=_refuse, strict=False)
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
        except ValueError:
            value = None
        if isinstance(value, dict) and needs in value:
            return value
        start = text.find("{", start + 1)
    return None


def _cut_object(text: str, needs: str) -> dict[str, JsonValue] | None:
    """Returns what is whole of an object that was not closed."""
    stop = text.rfind(",")
    while stop >= 0:
        found = _first_object(text[:stop] + "}", needs)
        if found is not None:
            return found
        stop = text.rfind(",", 0, stop)
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def whole_number(value: JsonValue, convert: Callable[[str], int] = int) -> int | None:
    """Returns an integer that may have come as text; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    try:
        return convert(value.strip()) if isinstance(value, str) else None
    except ValueError:
        return None


def plain_text(value: JsonValue) -> str:
    """Returns a text, or a list of texts as one; empty for anything else."""
    if isinstance(value, list):
        return ", ".join(plain_text(item) for item in value)
    return value.strip() if isinstance(value, str) else ""


def share(value: JsonValue) -> float | None:
    """Returns a number as one in [0, 1]; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return None
    return min(max(number, 0.0), 1.0) if math.isfinite(number) else None
