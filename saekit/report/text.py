"""Token ids to strings that people can read: whole characters across tokens, nothing invisible, nothing lost.

A *piece* is what is shown for one token in one place. Most tokens have one piece; a token that holds only part of a UTF-8
character gets its piece from its neighbours: the character stands at the token that begins it, the rest show a tie.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["TIE", "PieceTable", "TokenizerLike", "visible"]

TIE = "\u203f"
"""Shown at a token that only continues the character of the one before."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_NAMED = {"\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5", "\x7f": "\u2421", "\xa0": "\u237d"}
# Joiners belong to emoji and to Indic and Persian words: hiding them breaks text, showing them breaks it too.
_KEPT = {"\u200c", "\u200d"}


class TokenizerLike(Protocol):
    """What the report needs of a tokenizer; those of transformers have it."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Returns each id's entry in the vocabulary, in the vocabulary's own alphabet."""

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of the ids."""

    def __len__(self) -> int:
        """Size of the vocabulary."""


def _byte_alphabet() -> dict[str, int]:
    """Returns character -> byte of the byte-level BPE alphabet.

    Source: `bytes_to_unicode` of GPT-2 (github.com/openai/gpt-2, src/encoder.py): printable bytes stand for themselves, the
    others for the characters from U+0100 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def visible(text: str) -> str:
    """Returns `text` with every control, format and unassigned character replaced by something that can be seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character in _KEPT:
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return f"\u27e8U+{ord(character):04X}\u27e9"
    return character


def _split_characters(parts: Sequence[bytes]) -> list[str]:
    """Returns one string per part: the characters that begin in it, a tie where none does."""
    data = b"".join(parts)
    owner = [n for n, part in enumerate(parts) for _ in part]
    shown = [""] * len(parts)
    at = 0
    while at < len(data):
        lead = data[at]
        length = 1 if lead < 0xC2 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        try:
            character = visible(data[at : at + length].decode("utf-8"))
        except UnicodeDecodeError:
            character, length = f"\\x{lead:02x}", 1
        shown[owner[at]] += character
        at += length
    return [text or TIE for text in shown]


class PieceTable:
    """The pieces of one tokenizer that a report uses.

    Add every row and token first, then `compact`: ids are dense only from then on.
    """

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer
        self._special = {int(token) for token in getattr(tokenizer, "all_special_ids", ())}
        self._style = self._find_style()
        # Ids below _base are token ids; pieces that neighbours decide come after them.
        self._base = 0
        self._bytes: dict[int, bytes] = {}
        self._text: dict[int, str] = {}
        self._rows: list[NDArray[np.int32]] = []
        self._tokens: set[int] = set()

    def _find_style(self) -> str:
        entries = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        spaced = sum(1 for entry in entries if entry and entry[0] == "\u0120")
        underlined = sum(1 for entry in entries if entry and entry[0] == "\u2581")
        if spaced == underlined == 0:
            return "decode"
        return "bytes" if spaced >= underlined else "sentencepiece"

    def _entry_bytes(self, entry: str) -> bytes | None:
        """Returns the bytes of a vocabulary entry; None where it is written as plain text (added tokens)."""
        if self._style == "bytes":
            codes = [_ALPHABET.get(character) for character in entry]
            known = [code for code in codes if code is not None]
            return bytes(known) if len(known) == len(codes) else None
        found = _BYTE_TOKEN.fullmatch(entry)
        if found:
            return bytes([int(found[1], 16)])
        return entry.replace("\u2581", " ").encode("utf-8", "replace")

    def _look_up(self, tokens: Sequence[int]) -> None:
        """Fills `_text` for whole tokens and `_bytes` for those that hold part of a character."""
        new = [token for token in tokens if token not in self._text and token not in self._bytes]
        size = len(self._tokenizer)
        known = [token for token in new if 0 <= token < size]
        entries = dict(zip(known, self._tokenizer.convert_ids_to_tokens(known), strict=True)) if known else {}
        for token in new:
            entry = entries.get(token)
            if entry is None:
                self._text[token] = f"\u27e8{token}\u27e9"
            elif token in self._special:
                self._text[token] = visible(entry)
            elif self._style == "decode":
                self._text[token] = visible(self._tokenizer.decode([token]))
            else:
                self._add_entry(token, entry)

    def _add_entry(self, token: int, entry: str) -> None:
        data = self._entry_bytes(entry)
        if data is None:
            self._text[token] = visible(entry)
            return
        try:
            self._text[token] = visible(data.decode("utf-8"))
        except UnicodeDecodeError:
            self._bytes[token] = data

    def add_rows(self, rows: NDArray[np.int32]) -> None:
        """Takes token rows [R, T] that will be shown."""
        self._rows.append(rows)

    def add_tokens(self, tokens: NDArray[np.integer]) -> None:
        """Takes tokens that will be shown on their own, any shape."""
        self._tokens |= {int(token) for token in np.unique(tokens)}

    def compact(self) -> "Pieces":
        """Returns the pieces of everything added, under dense ids."""
        tokens = self._tokens | {int(token) for rows in self._rows for token in np.unique(rows)}
        self._look_up(sorted(tokens))
        self._base = max(tokens, default=0) + 1
        is_part = np.zeros(self._base, bool)
        is_part[list(self._bytes)] = True
        extra: dict[str, int] = {}
        sparse_rows = [self._resolve(rows, is_part[rows], extra) for rows in self._rows]
        strings = self._text | {token: _split_characters([part])[0] for token, part in self._bytes.items()}
        strings |= {self._base + n: text for text, n in extra.items()}
        order = sorted(strings)
        dense = np.full(self._base + len(extra), -1, np.int64)
        dense[order] = np.arange(len(order))
        return Pieces(
            strings=[strings[key] for key in order],
            special=[n for n, key in enumerate(order) if key in self._special],
            rows=[dense[rows].astype(np.int32) for rows in sparse_rows],
            dense=dense,
        )

    def _resolve(self, rows: NDArray[np.int32], is_part: NDArray[np.bool_], extra: dict[str, int]) -> NDArray[np.int64]:
        result = rows.astype(np.int64)
        for row in np.flatnonzero(is_part.any(axis=1)):
            # A sentinel on both sides turns every run into one rising and one falling edge.
            edges = np.flatnonzero(np.diff(np.concatenate(([0], is_part[row].astype(np.int8), [0]))))
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                shown = _split_characters([self._bytes[int(token)] for token in rows[row, start:stop]])
                result[row, start:stop] = [self._base + extra.setdefault(text, len(extra)) for text in shown]
        return result


class Pieces:
    """Dense pieces.

    Attributes:
        strings: what is shown, by piece id.
        special: piece ids of the tokenizer's special tokens.
        rows: piece ids of each array given to `add_rows`, int32 [R, T].
    """

    def __init__(
        self, *, strings: list[str], special: list[int], rows: list[NDArray[np.int32]], dense: NDArray[np.int64]
    ) -> None:
        self.strings = strings
        self.special = special
        self.rows = rows
        self._dense = dense

    def of_tokens(self, tokens: NDArray[np.integer]) -> NDArray[np.int32]:
        """Returns the piece ids of tokens shown on their own, same shape."""
        found: NDArray[np.int32] = self._dense[tokens].astype(np.int32)
        return found
