"""Puts rules and evidence into words."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.examples import Example, ExampleReader
from saekit.labelling.rules import Clause
from saekit.labelling.shapes import SHAPES
from saekit.labelling.vocabulary import Vocabulary

__all__ = ["Wording", "token_list"]

SHOWN_TOKENS = 4
"""Words in a short label; more become an ellipsis."""
SHOWN_SHARE = 0.15
"""Words with less than this share of the first word's strength stay out of the short label."""
DESCRIBED_CLAUSES = 5
ONE_WORD_SHARE = 0.6
"""A piece that is seen in one word this often is shown as that word."""
LOWER_CASE_SHARE = 0.25
"""From this share of a word's firings on, it is shown in lower case, as the label means all its spellings."""


def token_list(vocabulary: Vocabulary, tokens: Sequence[int], *, num: int) -> str:
    """Returns the first `num` different-looking tokens as a quoted list."""
    shown = list(dict.fromkeys(vocabulary.show(token) for token in tokens))
    return ", ".join(shown[:num])


class Wording:
    """Words the rule of one feature.

    Args:
        reader: reads contexts.
        examples: contexts of the feature, top ones first.
        fired_on: ids of the tokens on which the feature fires, to choose the spelling seen most.
    """

    def __init__(self, reader: ExampleReader, examples: Sequence[Example], fired_on: NDArray[np.int32]) -> None:
        self._reader = reader
        self._vocabulary = reader.vocabulary
        self._examples = examples
        self._count = Counter(fired_on.tolist())

    @cached_property
    def _words(self) -> list[tuple[int, tuple[str, bool]]]:
        """The token at each example's peak, and the word it belongs to with whether it begins it."""
        return [(example.tokens[example.peak], self._reader.word_at(example)) for example in self._examples]

    def label(self, clauses: Sequence[Clause]) -> str:
        """Returns the short label of a rule."""
        parts: list[str] = []
        for place in dict.fromkeys(clause.place for clause in clauses):
            own = [clause for clause in clauses if clause.place == place]
            telling = [clause for clause in own if clause.strength >= SHOWN_SHARE * own[0].strength]
            shown = list(dict.fromkeys(self._clause(clause) for clause in telling))
            more = ", ..." if len(shown) > SHOWN_TOKENS else ""
            parts.append(_PREFIX.get(place, "") + ", ".join(shown[:SHOWN_TOKENS]) + more)
        return "; ".join(parts)

    def fires_on(self, clauses: Sequence[Clause]) -> str:
        """Returns what a rule means in numbers, clause by clause, the strongest first."""
        parts = [
            f"{_PREFIX.get(clause.place, '')}{self._clause(clause)} ({clause.recall:.0%} of its firings, "
            f"{clause.strength:.0%} of its strength; active there {clause.precision:.0%} of the time)"
            for clause in clauses[:DESCRIBED_CLAUSES]
        ]
        rest = len(clauses) - DESCRIBED_CLAUSES
        return "; ".join(parts) + (f"; and {rest} more" if rest > 0 else "")

    def near(self, words: Sequence[int]) -> str:
        """Returns a list of words found near the firings."""
        return token_list(self._vocabulary, words, num=SHOWN_TOKENS)

    def excerpts(self, num: int) -> list[str]:
        """Returns the first contexts as lines of text, the peak between guillemets."""
        return [self._reader.excerpt(example) for example in self._examples[:num]]

    def _clause(self, clause: Clause) -> str:
        if clause.place == "always":
            return "all tokens"
        if clause.place == "shape":
            assert clause.shape is not None, "checked by Clause"
            return SHAPES[clause.shape].title
        if clause.place == "pair":
            return f"{self._spelling(clause.tokens)} after {self._plain(clause.previous)}"
        return self._spelling(clause.tokens) if clause.place == "current" else self._plain(clause.tokens)

    def _plain(self, tokens: Sequence[int]) -> str:
        """Returns the most usual spelling of a word, by the rank of its tokens in the vocabulary."""
        return self._vocabulary.show(min(tokens, key=lambda token: (not self._vocabulary.is_word_start(token), token)))

    def _spelling(self, tokens: Sequence[int]) -> str:
        """Returns the spelling the feature fires on most; a piece of a word with the words it is seen in."""
        token = max(tokens, key=lambda token: (self._count[token], -token))
        lower = [token for token in tokens if self._vocabulary.text(token).islower()]
        if lower and sum(self._count[token] for token in lower) >= LOWER_CASE_SHARE * sum(
            self._count[token] for token in tokens
        ):
            token = max(lower, key=lambda token: (self._count[token], -token))
        wanted = set(tokens)
        seen = [word for peak, word in self._words if peak in wanted]
        words = Counter(word for word, _ in seen)
        bare = self._vocabulary.text(token).strip()
        whole = sum(count for word, count in words.items() if word.casefold() == bare.casefold())
        if not bare.isalpha() or not words or 2 * whole >= len(seen):
            return self._vocabulary.show(token)
        usual = [(word, count) for word, count in words.most_common() if word.casefold() != bare.casefold()]
        if usual[0][1] >= ONE_WORD_SHARE * len(seen):
            return f'"{usual[0][0]}"'
        begins = 2 * sum(is_first for _, is_first in seen) >= len(seen)
        piece = f'"{bare}-"' if begins else f'"-{bare}"'
        return f"{piece} ({', '.join(word for word, _ in usual[:2])})"


_PREFIX = {"previous": "after ", "next": "before ", "nearby": "near "}
