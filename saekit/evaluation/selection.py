"""Which held-out tokens are evaluated: rows drawn once, so that every figure of a table is about the same text."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from saekit.activations import MASSIVE, NORMAL, PADDING, StoreView
from saekit.errors import DataError

__all__ = ["LossRows", "Selection"]

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossRows:
    """Token rows whose next-token losses are counted."""

    tokens: npt.NDArray[np.int32]
    """`[R, T]`."""
    is_replaced: BoolArray
    """Positions whose activation is replaced, `[R, T]`: every ordinary token, held out or not, as in use."""
    is_counted: BoolArray
    """Positions whose prediction is counted, `[R, T]`."""
    is_padding: BoolArray
    """`[R, T]`."""
    documents: Int64Array
    """Row of the per-document sums that a counted position belongs to, `[R, T]`; 0 elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Selection:
    """The evaluated tokens of a view."""

    view: StoreView
    rows: Int64Array
    """Chosen token rows, in random order."""
    flat: Int64Array
    """Flat positions of the view's tokens in these rows, ascending."""
    massive: Int64Array
    """Flat positions of the massive tokens of the view's documents, ascending."""

    @classmethod
    def draw(cls, view: StoreView, *, num_tokens: int, seed: int) -> Self:
        """Draws whole rows until they hold `num_tokens` tokens of the view, or until there are no more.

        Rows rather than documents, so that one book is never the whole sample; intervals still resample documents.

        Raises:
            DataError: the view has no tokens.
        """
        if view.num_tokens == 0:
            raise DataError("evaluate: the view has no tokens, needs held-out documents; raise the test fraction")
        order = np.random.default_rng(seed).permutation(view.rows())
        held = np.cumsum(view.mask[order].sum(axis=1))
        rows = order[: int(np.searchsorted(held, num_tokens)) + 1]
        chosen = np.zeros_like(view.mask)
        chosen[rows] = view.mask[rows]
        return cls(
            view=view,
            rows=rows,
            flat=StoreView(view.store, chosen).indices,
            massive=view.of_kind(MASSIVE).indices[:num_tokens],
        )

    def documents_of(self, flat: Int64Array) -> Int64Array:
        """Returns each token's row of the per-document sums, `[N]`; documents of equal text share one."""
        store = self.view.store
        keys = store.document_keys()[store.documents().reshape(-1)[flat]]
        return np.unique(keys, return_inverse=True)[1].astype(np.int64, copy=False)

    def loss_rows(self, num_tokens: int) -> LossRows:
        """Returns the first of the chosen rows that together have `num_tokens` counted positions, or all of them.

        A position is counted if its token and the next one are held-out ordinary tokens of one document: then the activation
        that predicts was replaced, and what it predicts was not trained on.
        """
        store = self.view.store
        kinds, documents = store.kinds()[self.rows], store.documents()[self.rows]
        is_ordinary = self.view.mask[self.rows] & (kinds == NORMAL)
        is_counted = np.zeros_like(is_ordinary)
        is_counted[:, :-1] = is_ordinary[:, :-1] & is_ordinary[:, 1:] & (documents[:, :-1] == documents[:, 1:])
        num_rows = int(np.searchsorted(np.cumsum(is_counted.sum(axis=1)), num_tokens)) + 1 if num_tokens else 0
        rows, is_counted, kinds = self.rows[:num_rows], is_counted[:num_rows], kinds[:num_rows]
        numbers = np.zeros(is_counted.shape, dtype=np.int64)
        flat = (rows[:, None] * store.context_len + np.arange(store.context_len))[is_counted]
        numbers[is_counted] = self.documents_of(flat)
        return LossRows(
            tokens=store.tokens()[rows],
            is_replaced=kinds == NORMAL,
            is_counted=is_counted,
            is_padding=kinds == PADDING,
            documents=numbers,
        )
