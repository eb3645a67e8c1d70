"""Which tokens are evaluated and which positions counted, against plain loops."""

from collections.abc import Callable

import numpy as np
import pytest

from saekit.activations.store import ActivationStore
from saekit.activations.view import StoreView
from saekit.errors import DataError
from saekit.evaluation.selection import Selection

Stores = Callable[..., ActivationStore]


def test_draw_takes_whole_rows_until_there_are_enough(tiny_store: Stores) -> None:
    _, test = tiny_store().split(0.4)
    selection = Selection.draw(test, num_tokens=60, seed=0)
    assert 60 <= len(selection.flat) < 60 + 16
    assert np.isin(selection.flat, test.indices).all()
    of_rows = test.indices[np.isin(test.indices // 16, selection.rows)]
    np.testing.assert_array_equal(selection.flat, of_rows)


def test_draw_takes_all_when_there_are_fewer(tiny_store: Stores) -> None:
    _, test = tiny_store().split(0.4)
    np.testing.assert_array_equal(Selection.draw(test, num_tokens=10**6, seed=0).flat, test.indices)


def test_draw_depends_on_the_seed_only(tiny_store: Stores) -> None:
    _, test = tiny_store().split(0.4)
    draws = [Selection.draw(test, num_tokens=60, seed=seed).rows.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_draw_keeps_massive_tokens_of_the_same_documents_apart(tiny_store: Stores) -> None:
    store = tiny_store()
    _, test = store.split(0.4)
    selection = Selection.draw(test, num_tokens=10**6, seed=0)
    expected = [
        row * 16 + position
        for row in range(store.num_rows)
        for position in range(16)
        if store.kinds()[row, position] == 3 and store.documents()[row, position] in set(test.documents)
    ]
    assert selection.massive.tolist() == expected
    assert expected
    assert not set(expected) & set(selection.flat.tolist())


def test_documents_of_gives_one_number_to_equal_texts(tiny_store: Stores) -> None:
    """The texts repeat after six documents: copies are not independent draws."""
    store = tiny_store()
    view = store.view()
    numbers = Selection.draw(view, num_tokens=10**6, seed=0).documents_of(view.indices)
    assert set(numbers) == set(range(6))
    text_of = store.documents().reshape(-1)[view.indices] % 6
    assert len(set(zip(numbers.tolist(), text_of.tolist(), strict=True))) == 6


@pytest.mark.parametrize(
    "packing, separator", [("pack", "eos"), ("pack", "none"), ("per_document", "eos")], ids=["eos", "joined", "padded"]
)
def test_loss_rows_count_pairs_of_ordinary_held_out_tokens_of_one_document(
    tiny_store: Stores, packing: str, separator: str
) -> None:
    store = tiny_store(packing=packing, separator=separator)
    # A large share, so that some held-out documents are neighbours.
    _, test = store.split(0.7)
    rows = Selection.draw(test, num_tokens=10**6, seed=3)
    loss = rows.loss_rows(10**6)
    kinds, documents, held = store.kinds(), store.documents(), set(test.documents)
    for at, row in enumerate(rows.rows):
        for t in range(16):
            is_ordinary = [kinds[row, s] == 0 and documents[row, s] in held for s in (t, min(t + 1, 15))]
            same = t < 15 and documents[row, t] == documents[row, t + 1]
            assert loss.is_counted[at, t] == (all(is_ordinary) and same)
            assert loss.is_replaced[at, t] == (kinds[row, t] == 0)
            assert loss.is_padding[at, t] == (kinds[row, t] == 1)
        np.testing.assert_array_equal(loss.tokens[at], store.tokens()[row])
    pairs = set(zip(loss.documents[loss.is_counted], (documents[rows.rows] % 6)[loss.is_counted], strict=True))
    assert sorted(number for number, _ in pairs) == list(range(len(pairs)))
    if packing == "per_document":
        assert loss.is_padding.any()


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_loss_rows_stop_when_there_are_enough(tiny_store: Stores, num_tokens: int) -> None:
    _, test = tiny_store().split(0.4)
    selection = Selection.draw(test, num_tokens=10**6, seed=0)
    counted = selection.loss_rows(num_tokens).is_counted
    assert counted.sum() >= num_tokens
    assert counted[:-1].sum() < max(num_tokens, 1)
    assert len(counted) == 0 or num_tokens


def test_draw_raises_when_the_view_is_empty(tiny_store: Stores) -> None:
    store = tiny_store()
    with pytest.raises(DataError, match="the view has no tokens, needs held-out documents"):
        Selection.draw(StoreView(store, np.zeros_like(store.kinds(), dtype=bool)), num_tokens=10, seed=0)
