from pathlib import Path

import numpy as np
import pytest

from saekit.errors import StoreError
from saekit.labelling.contexts import FeatureContexts
from saekit.report.selection import select_contexts, used_rows


def _contexts(num_top: int = 4, num_sampled: int = 9, num_features: int = 3) -> FeatureContexts:
    """Feature f uses f of its top places, and all of its sampled places but feature 0."""
    F, K, S, W = num_features, num_top, num_sampled, 4
    used = np.arange(K) < np.arange(F)[:, None]
    sampled = np.broadcast_to(np.arange(F)[:, None] > 0, (F, S))
    count = np.arange(F * S).reshape(F, S)
    arrays = {
        "top_row": np.where(used, np.arange(F * K).reshape(F, K), -1),
        "top_position": np.where(used, 1, -1),
        "top_act": np.where(used, 2.0, 0.0),
        "top_window": np.full((F, K, W), 7),
        "sample_row": np.where(sampled, count, -1),
        "sample_position": np.where(sampled, 2, -1),
        "sample_act": np.where(sampled, 1.0, 0.0),
        "sample_window": np.zeros((F, S, W)),
        "sample_stratum": np.where(sampled, np.arange(S) // 2, -1),
        "firing_count": np.arange(F),
        "max_act": np.arange(F),
        "mean_act": np.arange(F),
        "histogram": np.zeros((F, 16)),
        "position_count": np.zeros((F, 16)),
        "histogram_edges": np.arange(17),
    }
    return FeatureContexts(Path("none"), {name: np.asarray(array) for name, array in arrays.items()}, 100)


def test_select_contexts_keeps_used_places_in_order() -> None:
    top, sampled = select_contexts(_contexts(), num_top=4, num_sampled=99)
    assert top.offsets.tolist() == [0, 0, 1, 3]
    assert top.row.tolist() == [4, 8, 9]
    assert top.window.shape == (3, 4)
    assert top.stratum is None
    assert sampled.offsets.tolist() == [0, 0, 9, 18]
    assert sampled.row.tolist() == list(range(9, 27))
    assert sampled.stratum is not None
    assert sampled.stratum[:9].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_select_contexts_cuts_top_at_the_end_and_spreads_the_sample() -> None:
    top, sampled = select_contexts(_contexts(), num_top=1, num_sampled=3)
    assert top.row.tolist() == [4, 8]
    assert sampled.row.tolist() == [9, 13, 17, 18, 22, 26]


def test_select_contexts_leaves_the_arrays_as_they_are() -> None:
    contexts = _contexts()
    before = contexts.top_row.copy(), contexts.sample_row.copy()
    select_contexts(contexts, num_top=0, num_sampled=0)
    np.testing.assert_array_equal(contexts.top_row, before[0])
    np.testing.assert_array_equal(contexts.sample_row, before[1])


def test_used_rows_are_unique_and_ascending() -> None:
    blocks = list(select_contexts(_contexts(), num_top=4, num_sampled=99))
    assert used_rows(blocks, num_rows=30, context_len=8).tolist() == [4, *range(8, 27)]
    assert used_rows([], num_rows=30, context_len=8).tolist() == []


@pytest.mark.parametrize(("num_rows", "context_len"), [(20, 8), (30, 2)], ids=["row", "position"])
def test_used_rows_refuses_contexts_outside_the_store(num_rows: int, context_len: int) -> None:
    blocks = list(select_contexts(_contexts(), num_top=4, num_sampled=99))
    with pytest.raises(StoreError, match="give the store that the contexts were collected from"):
        used_rows(blocks, num_rows=num_rows, context_len=context_len)
