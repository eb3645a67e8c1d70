"""Which contexts of a run are shown, and which token rows they need.

Shapes: F features, K top contexts, S sampled contexts, W window positions, C contexts that are shown.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saekit.errors import StoreError
from saekit.labelling.contexts import FeatureContexts

__all__ = ["ContextBlock", "select_contexts", "used_rows"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ContextBlock:
    """The shown contexts of one kind, feature after feature."""

    offsets: NDArray[np.int64]
    """Feature f owns the contexts `offsets[f]:offsets[f + 1]` [F + 1]."""
    row: NDArray[np.int32]
    """Row of the token store [C]."""
    position: NDArray[np.int32]
    """Position of the peak in its row [C]."""
    act: NDArray[np.float32]
    """Activation at the peak [C]."""
    window: NDArray[np.uint8]
    """Activations around the peak, 255 = the feature's largest [C, W]."""
    stratum: NDArray[np.int32] | None
    """Histogram bin a sampled context was drawn from [C]; None for top contexts."""


def select_contexts(contexts: FeatureContexts, *, num_top: int, num_sampled: int) -> tuple[ContextBlock, ContextBlock]:
    """Returns at most `num_top` top contexts, strongest first, and `num_sampled` sampled ones over all strata, per feature."""
    top_used = contexts.top_row >= 0
    top_used[:, num_top:] = False
    top = _block(top_used, contexts.top_row, contexts.top_position, contexts.top_act, contexts.top_window, stratum=None)
    sampled = _block(
        _thin(contexts.sample_row >= 0, num_sampled),
        contexts.sample_row,
        contexts.sample_position,
        contexts.sample_act,
        contexts.sample_window,
        stratum=contexts.sample_stratum,
    )
    return top, sampled


def _thin(used: NDArray[np.bool_], limit: int) -> NDArray[np.bool_]:
    """Returns `used` with at most `limit` places a row, spread evenly over the used ones (which are ordered by stratum)."""
    kept = used.copy()
    for feature in np.flatnonzero(used.sum(axis=1) > limit):
        places = np.flatnonzero(used[feature])
        kept[feature] = False
        kept[feature, places[np.linspace(0, len(places) - 1, limit).round().astype(int)] if limit else places[:0]] = (
            True
        )
    return kept


def _block(
    used: NDArray[np.bool_],
    row: NDArray[np.int32],
    position: NDArray[np.int32],
    act: NDArray[np.float32],
    window: NDArray[np.uint8],
    *,
    stratum: NDArray[np.int32] | None,
) -> ContextBlock:
    return ContextBlock(
        offsets=np.concatenate(([0], np.cumsum(used.sum(axis=1)))).astype(np.int64),
        row=row[used],
        position=position[used],
        act=act[used],
        window=window[used],
        stratum=None if stratum is None else stratum[used],
    )


def used_rows(blocks: list[ContextBlock], *, num_rows: int, context_len: int) -> NDArray[np.int64]:
    """Returns the rows that the contexts stand in, ascending.

    Raises:
        StoreError: a context points outside the store.
    """
    for block in blocks:
        outside = (block.row >= num_rows) | (block.position < 0) | (block.position >= context_len)
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            raise StoreError(
                f"contexts: one stands at row {block.row[first]}, position {block.position[first]}, the store has"
                f" {num_rows} rows of {context_len} tokens; give the store that the contexts were collected from"
            )
    if not blocks:
        return np.zeros(0, np.int64)
    return np.unique(np.concatenate([block.row for block in blocks])).astype(np.int64)
