"""Several hook points of one cache side by side, and two of them as pairs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.activations import (
    NORMAL,
    ActivationStore,
    CacheConfig,
    JoinedStore,
    PairedStore,
    ShuffledBatches,
    cache_activations,
)
from saekit.errors import StoreError
from saekit.models import load_model

HOOK_POINTS = ["model.layers.1.mlp:input", "model.layers.1.mlp"]


@pytest.fixture(scope="module")
def folders(tiny_model_dir: Callable[[str], Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two caches of the same hook points, of different sizes."""
    made = []
    for num_tokens in (640, 320):
        config = CacheConfig.parse(
            {
                "model": {"name": str(tiny_model_dir("llama"))},
                "text": {"kind": "files", "paths": [str(texts)]},
                "tokens": {"context_len": 16},
                "hook_points": HOOK_POINTS,
                "num_tokens": num_tokens,
                "dtype": "float32",
            }
        )
        made.append(tmp_path_factory.mktemp("pairs"))
        cache_activations(config, made[-1], lm=load_model(config.model))
    return made


def test_pairs_are_the_activations_of_both_side_by_side(folders: list[Path]) -> None:
    inputs, targets = (ActivationStore.open(folders[0], hook_point) for hook_point in HOOK_POINTS)
    pairs = PairedStore(inputs, targets)
    assert pairs.d_in == inputs.d_in + targets.d_in
    assert pairs.hook_point == HOOK_POINTS[0]
    flat = pairs.view().indices[[5, 3, 8]]
    read = pairs.read_tokens(flat)
    assert torch.equal(read, torch.cat([inputs.read_tokens(flat), targets.read_tokens(flat)], dim=1))
    rows = pairs.read_rows([1, 0])
    assert torch.equal(rows, torch.cat([inputs.read_rows([1, 0]), targets.read_rows([1, 0])], dim=2))
    assert pairs.token_bytes == inputs.token_bytes + targets.token_bytes
    assert "PairedStore" in repr(pairs)


def test_a_token_is_normal_where_it_is_at_both(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = (ActivationStore.open(folders[0], hook_point) for hook_point in HOOK_POINTS)
    own, other = inputs.kinds().copy(), targets.kinds().copy()
    normal = np.argwhere((own == NORMAL) & (other == NORMAL))
    own[tuple(normal[0])], other[tuple(normal[1])] = 3, 3
    for store, kinds in ((inputs, own), (targets, other)):
        monkeypatch.setitem(store.__dict__, "_kinds_and_norms", (kinds, store.norms()))
    pairs = PairedStore(inputs, targets)
    assert pairs.view().num_tokens == len(normal) - 2
    train, test = pairs.split(0.3)
    assert train.num_tokens + test.num_tokens == len(normal) - 2


def test_batches_of_pairs_are_rows_of_the_view(folders: list[Path]) -> None:
    stores = (ActivationStore.open(folders[0], hook_point) for hook_point in HOOK_POINTS)
    view = PairedStore(*stores).view()
    with ShuffledBatches(view, batch_size=32, seed=1) as batches:
        found, again = batches.next_batch(), batches.batch_indices(0, 0)
    assert torch.equal(found, view.read(again))


def test_hook_points_of_different_caches_are_refused(folders: list[Path]) -> None:
    first = ActivationStore.open(folders[0], HOOK_POINTS[0])
    second = ActivationStore.open(folders[1], HOOK_POINTS[1])
    with pytest.raises(StoreError, match=r"another cache than .* needs hook points of one"):
        PairedStore(first, second)


def test_joined_hook_points_are_in_the_asked_order(folders: list[Path]) -> None:
    stores = [ActivationStore.open(folders[0], hook_point) for hook_point in HOOK_POINTS]
    joined = JoinedStore([stores[1], stores[0], stores[1]])
    assert joined.d_in == 3 * 32
    assert joined.hook_point == f"{HOOK_POINTS[1]},{HOOK_POINTS[0]},{HOOK_POINTS[1]}"
    flat = joined.view().indices[[4, 1]]
    first, second = (store.read_tokens(flat) for store in stores)
    assert torch.equal(joined.read_tokens(flat), torch.cat([second, first, second], dim=1))
    assert joined.read_rows([1, 0]).shape == (2, 16, 96)
    assert np.array_equal(joined.norms(), stores[1].norms())


def test_a_single_hook_point_is_not_joined(folders: list[Path]) -> None:
    with pytest.raises(StoreError, match="found 1, needs those of at least two hook points"):
        JoinedStore([ActivationStore.open(folders[0], HOOK_POINTS[0])])


def test_batches_of_joined_hook_points_go_on_exactly_and_on_no_others(folders: list[Path]) -> None:
    stores = [ActivationStore.open(folders[0], hook_point) for hook_point in HOOK_POINTS]
    with ShuffledBatches(JoinedStore(stores).view(), batch_size=32, seed=1) as batches:
        batches.next_batch()
        state = batches.state_dict()
        expected = batches.next_batch()
    with ShuffledBatches(JoinedStore(stores).view(), batch_size=32, seed=1) as batches:
        batches.load_state_dict(state)
        assert torch.equal(batches.next_batch(), expected)
    swapped = JoinedStore(stores[::-1]).view()
    with (
        ShuffledBatches(swapped, batch_size=32, seed=1) as batches,
        pytest.raises(StoreError, match="saved with hook_point"),
    ):
        batches.load_state_dict(state)
