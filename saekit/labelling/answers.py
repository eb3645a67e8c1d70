"""Reads JSON out of what a language model wrote: bare, fenced, or with talk around it."""

import json
from collections.abc import Callable
from importlib import resources

from pydantic import JsonValue

__all__ = ["UnusableAnswerError", "parse_object", "prompt_template", "whole_number"]


class UnusableAnswerError(Exception):
    """An answer that holds no object of the needed form; its message says why, for the record of a failure."""


def prompt_template(name: str) -> str:
    """Returns the text of a prompt file such as `explain_v1`; a changed text gets a new name, as labels carry it."""
    return (resources.files("saekit.labelling") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def parse_object(text: str, *, needs: str) -> dict[str, JsonValue]:
    """Returns the first JSON object in `text` that has the key `needs`.

    Raises:
        UnusableAnswerError: there is none.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse)
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
        except ValueError:
            value = None
        if isinstance(value, dict) and needs in value:
            return value
        start = text.find("{", start + 1)
    shown = " ".join(text.split())[:80]
    raise UnusableAnswerError(f"no JSON object with {needs!r} in {shown!r}" if shown else "empty answer")


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
