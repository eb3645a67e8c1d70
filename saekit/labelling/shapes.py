"""Predicates on tokens that no list of tokens can state: digits of years, names, places in a sentence, line or row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.vocabulary import Vocabulary

__all__ = ["SHAPES", "Shape", "TokenTraits"]

Mask = NDArray[np.bool_]

_ENDINGS = (".", "!", "?", '."', '!"', '?"', ".)", ".\u201d")


class TokenTraits:
    """What the predicates are made of, computed once for a table of tokens.

    Args:
        ids: token ids [L].
        segment_start: first place of the token's document within its row [L].
        opens_document: the token is the first of its document [L].
        context_len: positions in a row.
        vocabulary: texts of the ids.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        segment_start: NDArray[np.int64],
        opens_document: Mask,
        context_len: int,
        vocabulary: Vocabulary,
    ) -> None:
        used, self._which = np.unique(ids, return_inverse=True)
        self._texts = [vocabulary.text(int(token)) for token in used]
        self.place = np.arange(len(ids))
        self.segment_start = segment_start
        self.position = self.place % context_len
        self.opens_document = opens_document

    def by_text(self, test: Callable[[str], bool]) -> Mask:
        """Returns where a test of the token's own text holds [L]."""
        holds: Mask = np.array([test(text) for text in self._texts], dtype=bool)[self._which]
        return holds

    def before(self, mask: Mask, steps: int = 1) -> Mask:
        """Returns where `mask` holds `steps` tokens earlier in the same row and document [L]."""
        shifted: Mask = np.zeros_like(mask)
        shifted[steps:] = mask[:-steps]
        shifted &= self.place - steps >= self.segment_start
        return shifted

    def after(self, mask: Mask) -> Mask:
        """Returns where `mask` holds for the next token of the same row and document [L]."""
        shifted = np.zeros_like(mask)
        shifted[:-1] = mask[1:] & (self.segment_start[1:] == self.segment_start[:-1])
        return shifted

    def since_opening(self, opens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the running sum of `opens` within the row and document, the token itself included [L]."""
        total = np.cumsum(opens)
        before_segment = total[self.segment_start] - opens[self.segment_start]
        return total - before_segment

    @cached_property
    def digit(self) -> Mask:
        """The token is digits."""
        return self.by_text(lambda text: text.strip().isdigit())

    @cached_property
    def spaced(self) -> Mask:
        """The token opens a word: it begins with a space or stands first."""
        spaced: Mask = self.by_text(lambda text: text[:1].isspace()) | (self.place == self.segment_start)
        return spaced

    @cached_property
    def letters(self) -> Mask:
        """The token is letters."""
        return self.by_text(lambda text: text.strip().isalpha())

    @cached_property
    def piece(self) -> Mask:
        """The token goes on with a word that the token before began."""
        return self.letters & self.by_text(lambda text: not text[:1].isspace()) & self.before(self.letters)

    @cached_property
    def capitalised(self) -> Mask:
        """The token opens a word with a capital."""
        return self.by_text(lambda text: text.strip()[:1].isupper()) & ~self.piece

    @cached_property
    def ends_sentence(self) -> Mask:
        """The token ends a sentence."""
        return self.by_text(lambda text: text.strip() in _ENDINGS or "\n" in text)

    @cached_property
    def in_number(self) -> NDArray[np.int64]:
        """How many tokens of the same number have been read, the token included; 0 outside numbers [L]."""
        starts = self.digit & (self.spaced | ~self.before(self.digit))
        last_start = np.maximum.accumulate(np.where(starts, self.place, -1))
        return np.where(self.digit & (last_start >= self.segment_start), self.place - last_start + 1, 0)

    @cached_property
    def year(self) -> Mask:
        """The token is a digit of, or the whole of, a number that reads 1000 to 2999."""
        whole = self.by_text(lambda text: text.strip().isdigit() and len(text.strip()) == 4 and text.strip()[0] in "12")
        fourth = (self.in_number == 4) & ~self.after(self.in_number == 5)
        one_or_two = self.by_text(lambda text: text.strip() in {"1", "2"})
        fourth &= self.before(one_or_two, 3)
        inside = fourth.copy()
        for steps in (1, 2, 3):
            inside[:-steps] |= fourth[steps:]
        single: Mask = inside & self.digit & self.by_text(lambda text: len(text.strip()) == 1)
        return whole | single


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One predicate."""

    title: str
    """What a label says: `digits of years`."""
    holds: Callable[[TokenTraits], Mask]


def _nth_digit(n: int) -> Callable[[TokenTraits], Mask]:
    return lambda traits: traits.in_number == n


def _first_positions(count: int) -> Callable[[TokenTraits], Mask]:
    return lambda traits: traits.position < count


def _bracket(traits: TokenTraits) -> Mask:
    opened = traits.by_text(lambda text: text.count("(") > text.count(")")).astype(np.int64)
    closed = traits.by_text(lambda text: text.count(")") > text.count("(")).astype(np.int64)
    is_open: Mask = traits.since_opening(opened - closed) > 0
    return is_open


def _quoted(traits: TokenTraits) -> Mask:
    marks = traits.by_text(lambda text: sum(text.count(mark) for mark in '"\u201c\u201d') % 2 == 1).astype(np.int64)
    is_open: Mask = traits.since_opening(marks) % 2 == 1
    return is_open


def _line_start(traits: TokenTraits) -> Mask:
    return traits.before(traits.by_text(lambda text: "\n" in text))


def _ascii_letters(text: str) -> bool:
    return all(ord(character) < 128 for character in text)


SHAPES: dict[str, Shape] = {
    "digit": Shape(title="digits", holds=lambda t: t.digit),
    "year": Shape(title="digits of years", holds=lambda t: t.year),
    "number_1": Shape(title="first digit of numbers", holds=_nth_digit(1)),
    "number_2": Shape(title="second digit of numbers", holds=_nth_digit(2)),
    "number_3": Shape(title="third digit of numbers", holds=_nth_digit(3)),
    "number_4": Shape(title="fourth digit of numbers", holds=_nth_digit(4)),
    "after_number": Shape(title="token after a number", holds=lambda t: t.before(t.digit) & ~t.digit),
    "capitalised": Shape(title="capitalised words", holds=lambda t: t.capitalised),
    "name": Shape(
        title="capitalised words inside sentences",
        holds=lambda t: t.capitalised & ~t.before(t.ends_sentence) & (t.place > t.segment_start),
    ),
    "second_name": Shape(
        title="capitalised words after a capitalised word", holds=lambda t: t.capitalised & t.before(t.capitalised)
    ),
    "capitals": Shape(
        title="words in capitals", holds=lambda t: t.by_text(lambda x: x.strip().isupper() and len(x.strip()) > 1)
    ),
    "piece": Shape(title="later pieces of split words", holds=lambda t: t.piece),
    "name_piece": Shape(
        title="later pieces of split names",
        holds=lambda t: t.piece & (t.before(t.capitalised) | t.before(t.capitalised, 2)),
    ),
    "first_piece": Shape(title="first piece of split words", holds=lambda t: t.letters & ~t.piece & t.after(t.piece)),
    "punctuation": Shape(
        title="punctuation",
        holds=lambda t: t.by_text(lambda x: bool(x.strip()) and not any(c.isalnum() for c in x) and "\ufffd" not in x),
    ),
    "line_break": Shape(title="line breaks", holds=lambda t: t.by_text(lambda x: "\n" in x)),
    "line_start": Shape(title="first token of a line", holds=_line_start),
    "sentence_start": Shape(title="first token of a sentence", holds=lambda t: t.before(t.ends_sentence)),
    "document_start": Shape(title="first token of a document", holds=lambda t: t.opens_document),
    "row_start": Shape(title="first position of the context", holds=_first_positions(1)),
    "row_start_2": Shape(title="first 2 positions of the context", holds=_first_positions(2)),
    "row_start_4": Shape(title="first 4 positions of the context", holds=_first_positions(4)),
    "row_start_16": Shape(title="first 16 positions of the context", holds=_first_positions(16)),
    "bracket": Shape(title="inside round brackets", holds=_bracket),
    "quoted": Shape(title="inside quotation marks", holds=_quoted),
    "foreign": Shape(title="letters beyond ASCII", holds=lambda t: t.by_text(lambda x: not _ascii_letters(x))),
}
