"""Tokens with their neighbours: flat arrays over whole rows that rules are matched against."""

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.shapes import SHAPES, TokenTraits
from saekit.labelling.tokenrows import TokenRows
from saekit.labelling.vocabulary import Vocabulary

__all__ = ["NEARBY", "TokenTable"]

NEARBY = 32
"""Tokens, the current one included, in which a `nearby` rule looks."""


class TokenTable:
    """All L = r * T tokens of r rows of a store, in order, with the neighbours that a causal reader would know.

    Attributes:
        rows: the rows, ascending, int64 [r].
        ids: token ids, int32 [L].
        previous, next: ids of the neighbours, -1 at the border of a row or document, int32 [L].
        documents: int32 [L].
        opens_document: the token is the first of its document, bool [L].
        segment_start, segment_end: first and last place of the token's document within its row, int64 [L].
    """

    def __init__(self, store: TokenRows, rows: NDArray[np.int64], vocabulary: Vocabulary) -> None:
        self.rows = np.unique(rows)
        self.context_len = store.context_len
        self.vocabulary = vocabulary
        self.ids: NDArray[np.int32] = np.asarray(store.tokens()[self.rows], dtype=np.int32).reshape(-1)
        self.documents: NDArray[np.int32] = np.asarray(store.documents()[self.rows], dtype=np.int32).reshape(-1)
        place = np.arange(len(self.ids), dtype=np.int64)
        opens = np.ones(len(self.ids), dtype=bool)
        opens[1:] = (np.diff(self.documents) != 0) | (place[1:] % self.context_len == 0)
        starts = np.flatnonzero(opens)
        lengths = np.diff(starts, append=len(self.ids))
        self.segment_start: NDArray[np.int64] = np.repeat(starts, lengths)
        self.segment_end: NDArray[np.int64] = np.repeat(starts + lengths - 1, lengths)
        self.previous = np.where(opens, -1, np.roll(self.ids, 1)).astype(np.int32)
        self.next = np.where(place == self.segment_end, -1, np.roll(self.ids, -1)).astype(np.int32)
        # A document that began in an earlier row, drawn or not, does not begin here.
        earlier = np.asarray(store.documents()[np.maximum(self.rows - 1, 0), -1])
        first = place[:: self.context_len]
        self.opens_document: NDArray[np.bool_] = opens.copy()
        self.opens_document[first] = (earlier != self.documents[first]) | (self.rows == 0)
        self._shapes: dict[str, NDArray[np.bool_]] = {}
        self._traits: TokenTraits | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, flat: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns where the tokens with store indices `flat` (row * T + position) stand in the table."""
        row = np.searchsorted(self.rows, flat // self.context_len)
        return row * self.context_len + flat % self.context_len

    def shape(self, name: str) -> NDArray[np.bool_]:
        """Returns where a predicate of `saekit.labelling.shapes` holds [L]."""
        if name not in self._shapes:
            if self._traits is None:
                self._traits = TokenTraits(
                    self.ids, self.segment_start, self.opens_document, self.context_len, self.vocabulary
                )
            self._shapes[name] = SHAPES[name].holds(self._traits)
        return self._shapes[name]
