"""Token rules: what a lexical label claims about when a feature fires, in a form that a program can check.

A rule looks at a token and the tokens around it in the same row and document, and gives the token a score in [0, 1].
"""

from collections.abc import Iterator
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from saekit.config import Config
from saekit.labelling.shapes import SHAPES
from saekit.labelling.tokentable import NEARBY, TokenTable

__all__ = ["Clause", "Rule", "TokenIndex"]

Place = Literal["current", "previous", "next", "nearby"]


class Clause(Config):
    """One way for a rule to hold at a token."""

    place: Place | Literal["pair", "shape", "always"]
    """Which token must be one of `tokens`: itself, the one before, the one after, or any of itself and the 31 before it.
    `pair`: itself of `tokens` after one of `previous`. `shape`: the predicate `shape` holds. `always`: every token."""
    tokens: tuple[int, ...] = ()
    """Token ids."""
    previous: tuple[int, ...] = ()
    """Token ids for the first of a pair."""
    shape: str | None = None
    """Name of a predicate of `saekit.labelling.shapes`."""
    precision: float
    """Share of such tokens on which the feature fired in training: the score that the clause gives."""
    recall: float
    """Share of the feature's firings in training that were on such tokens."""
    strength: float = 0.0
    """Share of the feature's squared activations in training that was on such tokens."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.place == "shape" and self.shape not in SHAPES:
            raise ValueError(f"no shape {self.shape!r}, needs one of {', '.join(SHAPES)}")
        if self.place not in {"shape", "always"} and not self.tokens:
            raise ValueError(f"a clause on the {self.place} token needs tokens")
        if self.place == "pair" and not self.previous:
            raise ValueError("a pair needs previous tokens")
        return self


class Rule(Config):
    """The feature fires where any clause holds; a token's score is the largest precision among those that hold."""

    clauses: tuple[Clause, ...] = ()
    """Without clauses the rule never fires: what an empty label predicts."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All token ids that the rule speaks of, in the order of its clauses, each once."""
        return tuple(dict.fromkeys(token for clause in self.clauses for token in (*clause.previous, *clause.tokens)))


class TokenIndex:
    """Finds the places of a `TokenTable` where clauses hold, fast enough for thousands of rules."""

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self._current = _Inverted(table.ids)
        self._previous = _Inverted(table.previous)
        self._next = _Inverted(table.next)

    def places(self, clause: Clause) -> NDArray[np.int64]:
        """Returns where in the table a clause holds, ascending."""
        if clause.place == "always":
            return np.arange(len(self.table))
        if clause.place == "shape":
            assert clause.shape is not None, "checked by Clause"
            return np.flatnonzero(self.table.shape(clause.shape))
        if clause.place == "nearby":
            return self.nearby(clause.tokens)
        if clause.place == "pair":
            current = self._current.places(clause.tokens)
            return current[np.isin(self.table.previous[current], clause.previous)]
        index = {"current": self._current, "previous": self._previous, "next": self._next}[clause.place]
        return index.places(clause.tokens)

    def nearby(self, tokens: tuple[int, ...]) -> NDArray[np.int64]:
        """Returns the places at or up to 31 tokens after one of `tokens`, in the same row and document."""
        at = self._current.places(tokens)
        reach = at[:, None] + np.arange(NEARBY)
        inside = reach <= self.table.segment_end[at][:, None]
        return np.unique(reach[inside])

    def scores(self, rule: Rule) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns the places where a rule holds, ascending, and the score of each."""
        found = list(self._scored(rule))
        if not found:
            return np.empty(0, dtype=np.int64), np.empty(0)
        places = np.concatenate([at for at, _ in found])
        scores = np.concatenate([np.full(len(at), score) for at, score in found])
        order = np.lexsort((-scores, places))
        places, scores = places[order], scores[order]
        first = np.diff(places, prepend=-1) > 0
        return places[first], scores[first]

    def _scored(self, rule: Rule) -> Iterator[tuple[NDArray[np.int64], float]]:
        for clause in rule.clauses:
            yield self.places(clause), clause.precision


class _Inverted:
    """Value -> where it stands."""

    def __init__(self, values: NDArray[np.int32]) -> None:
        self._order = np.argsort(values, kind="stable").astype(np.int64, copy=False)
        self._starts = np.searchsorted(values[self._order], np.arange(int(values.max(initial=-1)) + 2))

    def places(self, values: tuple[int, ...]) -> NDArray[np.int64]:
        known = [value for value in values if 0 <= value < len(self._starts) - 1]
        runs = [self._order[self._starts[value] : self._starts[value + 1]] for value in known]
        return np.sort(np.concatenate(runs)) if runs else np.empty(0, dtype=np.int64)
