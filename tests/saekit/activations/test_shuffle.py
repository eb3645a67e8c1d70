"""Batches: every token once an epoch, on any number of ranks, in an order that is position and seed alone."""

import gc
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from saekit.activations import ActivationStore, ShuffledBatches, StoreView, measure_mixing
from saekit.activations.chunks import chunk_shape
from saekit.activations.mixing import expected_documents
from saekit.activations.order import EpochOrder
from saekit.errors import ConfigError, StoreError

NDArray = np.ndarray[Any, Any]

# In the fixture a token has 64 bytes: whole, windows of a few hundred tokens, windows that hold less than two batches.
MEMORY = {"whole": 1e9, "windows": 30_000, "tight": 3_000}


@pytest.fixture(scope="module")
def view(store: ActivationStore) -> StoreView:
    """The training side."""
    return store.split(0.2)[0]


@pytest.fixture(params=sorted(MEMORY))
def memory_bytes(request: pytest.FixtureRequest) -> float:
    """Room for the whole view, for a part, for hardly a batch."""
    return MEMORY[request.param]


def epoch_of(batches: ShuffledBatches) -> torch.Tensor:
    return torch.cat([batches.next_batch() for _ in range(batches.batches_per_epoch)])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_token_comes_once_an_epoch_on_any_world_size(
    world_size: int, memory_bytes: float, view: StoreView
) -> None:
    size = 12 // world_size
    ranks = [
        ShuffledBatches(view, batch_size=size, seed=0, rank=rank, world_size=world_size, memory_bytes=memory_bytes)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        seen = []
        for batch in range(ranks[0].batches_per_epoch):
            flat = ranks[0].batch_indices(epoch, batch)
            given = torch.cat([rank.next_batch() for rank in ranks])
            assert given.dtype == torch.float32
            assert torch.equal(given, view.read(flat))
            seen.append(flat)
        tokens = np.concatenate(seen)
        assert len(np.unique(tokens)) == len(tokens)
        assert np.isin(tokens, view.indices).all()
        assert view.num_tokens - len(tokens) < 12
    for rank in ranks:
        rank.close()


def test_global_batches_are_the_same_for_every_world_size(memory_bytes: float, view: StoreView) -> None:
    alone = ShuffledBatches(view, batch_size=12, seed=3, memory_bytes=memory_bytes)
    three = ShuffledBatches(view, batch_size=4, seed=3, rank=1, world_size=3, memory_bytes=memory_bytes)
    for batch in range(alone.batches_per_epoch):
        assert np.array_equal(alone.batch_indices(1, batch), three.batch_indices(1, batch))


def test_order_depends_on_seed_and_epoch(memory_bytes: float, view: StoreView) -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return (
            ShuffledBatches(view, batch_size=12, seed=seed, memory_bytes=memory_bytes).batch_indices(epoch, 0).tolist()
        )

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(seed, epoch)) for seed, epoch in itertools.product(range(3), range(3))}) == 9


@pytest.mark.parametrize("position", [0, 1, 17, 64, 130])
def test_state_goes_on_exactly(position: int, memory_bytes: float, view: StoreView) -> None:
    with (
        ShuffledBatches(view, batch_size=11, seed=5, memory_bytes=memory_bytes) as straight,
        ShuffledBatches(view, batch_size=11, seed=5, memory_bytes=memory_bytes) as resumed,
    ):
        for _ in range(position):
            straight.next_batch()
        state = json.loads(json.dumps(straight.state_dict()))
        # The other source has gone elsewhere and has read ahead there.
        for _ in range(3):
            resumed.next_batch()
        resumed.load_state_dict(state)
        assert resumed.tokens_read == straight.tokens_read == position * 11
        for _ in range(150):
            assert torch.equal(straight.next_batch(), resumed.next_batch())
        assert straight.state_dict() == resumed.state_dict()


def test_state_goes_on_with_other_ranks(memory_bytes: float, view: StoreView) -> None:
    alone = ShuffledBatches(view, batch_size=12, seed=5, memory_bytes=memory_bytes)
    for _ in range(20):
        alone.next_batch()
    ranks = [
        ShuffledBatches(view, batch_size=6, seed=5, rank=rank, world_size=2, memory_bytes=memory_bytes)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    for _ in range(10):
        assert torch.equal(alone.next_batch(), torch.cat([rank.next_batch() for rank in ranks]))


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 6}, "global_batch_size"),
        ({"memory_bytes": 30_000}, "window_batches"),
    ],
    ids=["seed", "batch-size", "memory"],
)
def test_state_of_another_source_is_refused(changes: dict[str, float], key: str, view: StoreView) -> None:
    settings: dict[str, float] = {"batch_size": 12, "seed": 0, "memory_bytes": 1e9}
    state = ShuffledBatches(view, **settings).state_dict()
    with pytest.raises(StoreError, match=f"saved with {key} "):
        ShuffledBatches(view, **(settings | changes)).load_state_dict(state)


def test_state_of_an_earlier_order_is_refused_in_one_line(view: StoreView) -> None:
    old = {"epoch": 0, "batch": 3, "seed": 0, "window_runs": 7, "run_tokens": 2}
    with pytest.raises(StoreError, match=r"saved under order 1 .* in order 2; train into a new folder"):
        ShuffledBatches(view, batch_size=12, seed=0).load_state_dict(old)


def test_state_over_other_tokens_is_refused(store: ActivationStore, view: StoreView) -> None:
    state = ShuffledBatches(view, batch_size=12, seed=0).state_dict()
    with pytest.raises(StoreError, match="saved with tokens "):
        ShuffledBatches(store.split(0.2, seed=9)[0], batch_size=12, seed=0).load_state_dict(state)


def test_order_does_not_depend_on_reading_ahead(
    memory_bytes: float, view: StoreView, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShuffledBatches(view, batch_size=12, seed=0, memory_bytes=memory_bytes) as ahead:
        expected = epoch_of(ahead)
    with ShuffledBatches(view, batch_size=12, seed=0, memory_bytes=memory_bytes) as batches:
        parts = []
        for _ in range(batches.batches_per_epoch):
            # What was read ahead is thrown away each time.
            batches.load_state_dict(batches.state_dict())
            monkeypatch.setattr(batches, "_next", None)
            parts.append(batches.next_batch())
    assert torch.equal(torch.cat(parts), expected)


def test_given_batches_are_not_touched_again(view: StoreView) -> None:
    with ShuffledBatches(view, batch_size=12, seed=0) as batches:
        first = batches.next_batch()
        kept = first.clone()
        first.zero_()
        epoch_of(batches)
        batches.load_state_dict(ShuffledBatches(view, batch_size=12, seed=0).state_dict())
        assert torch.equal(batches.next_batch(), kept)


def test_memory_of_a_batch_is_used_again_once_nothing_shares_it(view: StoreView) -> None:
    with ShuffledBatches(view, batch_size=12, seed=0) as batches:
        part = batches.next_batch()[3:5]
        kept, place = part.clone(), part.data_ptr()
        given = [batches.next_batch() for _ in range(5)]
        assert torch.equal(part, kept)
        places = {batch.data_ptr() for batch in given}
        assert len(places) == 5
        assert not any(start <= place < start + 12 * view.d_in * 4 for start in places)
        del given
        # One batch is made ahead; it may have taken new memory.
        assert len({batches.next_batch().data_ptr() for _ in range(20)} - places) <= 2


@pytest.fixture
def threads() -> Iterator[None]:
    """Fails the test if one of our threads outlives it."""
    before = {thread.ident for thread in threading.enumerate()}
    yield
    gc.collect()
    left = [thread for thread in threading.enumerate() if thread.ident not in before and "saekit" in thread.name]
    for thread in left:
        thread.join(timeout=5)
    assert not [thread.name for thread in left if thread.is_alive()]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "dropped"])
def test_no_thread_is_left(is_closed: bool, memory_bytes: float, view: StoreView) -> None:
    batches = ShuffledBatches(view, batch_size=12, seed=0, memory_bytes=memory_bytes)
    batches.next_batch()
    if is_closed:
        batches.close()


def test_error_in_the_reading_thread_reaches_the_caller(view: StoreView, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StoreError("shard 3 is gone")

    monkeypatch.setattr(view.store, "read_chunks", fail)
    with ShuffledBatches(view, batch_size=12, seed=0) as batches, pytest.raises(StoreError, match="shard 3"):
        batches.next_batch()


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"batch_size": 0}, ConfigError, "batch_size 0"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, ConfigError, "rank 2 of 2"),
        ({"batch_size": 1000, "world_size": 3}, StoreError, "one batch over all ranks needs 3,000"),
    ],
    ids=["no-batch", "rank-outside", "too-few-tokens"],
)
def test_bad_settings_are_refused(
    settings: dict[str, int], error: type[Exception], message: str, view: StoreView
) -> None:
    with pytest.raises(error, match=message):
        ShuffledBatches(view, seed=0, **settings)


def order_over(mask: NDArray, chunk: int, **settings: int) -> EpochOrder:
    """The order of the tokens of a mask in chunks of equal size, the last one shorter."""
    bounds = np.append(np.arange(0, len(mask), chunk), len(mask))
    return EpochOrder(mask, bounds, seed=1, **settings)


@pytest.mark.parametrize(
    ("num_tokens", "memory_tokens", "chunk", "batch"),
    [(100_000, 20_000, 64, 96), (99_999, 60_000, 7, 128), (500, 500, 3, 12), (1000, 400, 50, 11), (10, 3, 5, 1)],
)
def test_order_gives_every_token_at_most_once_from_equal_lanes(
    num_tokens: int, memory_tokens: int, chunk: int, batch: int
) -> None:
    mask = np.random.default_rng(0).random(num_tokens) < 0.9
    order = order_over(mask, chunk, memory_tokens=memory_tokens, batch_tokens=batch)
    assert order.num_lanes * order.lane_batch == batch
    lanes, left_out = range(order.num_lanes), []
    for epoch in range(2):
        windows = [order.window(epoch, number, lanes) for number in range(order.num_windows)]
        assert np.array_equal(np.sort(np.concatenate([window.tokens for window in windows])), np.flatnonzero(mask))
        given: list[int] = []
        for number, window in enumerate(windows):
            places = order.shuffled(epoch, number, lanes)
            given += window.tokens[places].ravel().tolist()
            # A lane's places are its own, also for a rank that knows of no other lanes.
            own = range(order.num_lanes // 2, order.num_lanes)
            part = order.window(epoch, number, own).tokens[order.shuffled(epoch, number, own)]
            assert np.array_equal(part, window.tokens[places][own.start :])
            held = len(window.tokens) if order.is_whole else order.window_batches * batch + order.num_lanes * chunk
            assert order.is_whole or order.window_batches == 1 or held <= memory_tokens / 2
        assert len(given) == len(set(given)) == order.batches * batch
        assert order.num_tokens - len(given) < batch
        left_out.append(set(np.flatnonzero(mask).tolist()) - set(given))
    assert not left_out[0] or left_out[0] != left_out[1]


def test_ranks_read_their_own_chunks_and_each_once_an_epoch(view: StoreView, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    # The chunk of the fixture's files holds all of its tokens.
    bounds = np.append(np.arange(0, view.store.num_tokens, 4), view.store.num_tokens)
    monkeypatch.setattr(type(view.store), "chunk_bounds", bounds)

    def read_tokens(chunks: NDArray, out: NDArray) -> None:
        read[-1] += chunks.tolist()
        flat = np.concatenate([np.arange(bounds[chunk], bounds[chunk + 1]) for chunk in chunks])
        out[:] = view.store.codec.to_array(view.store.read_tokens(flat))

    monkeypatch.setattr(view.store, "read_chunks", read_tokens)
    used = {int(chunk) for chunk in np.searchsorted(bounds, view.indices, side="right") - 1}
    for memory in (1e9, 30_000):
        read.clear()
        for rank in range(2):
            read.append([])
            with ShuffledBatches(view, batch_size=6, seed=0, rank=rank, world_size=2, memory_bytes=memory) as batches:
                order, own = batches._order, len(batches._lanes)
                for _ in range(batches.batches_per_epoch):
                    batches.next_batch()
            assert own * 2 == order.num_lanes == 12
            # Without what was read ahead for the next epoch; a chunk where two lanes meet is read for both.
            ahead = 0 if order.is_whole else len(order.window(1, 0, batches._lanes).chunks)
            assert len(read[-1]) - ahead <= len(used) / 2 + own + 1
        assert set(read[0]) | set(read[1]) == used


@pytest.mark.parametrize(
    ("width", "batch", "least"),
    [(768, 4096, 0.98), (4096, 4096, 0.98), (768, 16_384, 0.9), (4096, 65_536, 0.95)],
)
def test_windows_mix_like_a_full_shuffle(width: int, batch: int, least: float) -> None:
    # Documents of 300 tokens in the default memory: the bytes of a token decide how many chunks a window holds.
    num_tokens = 8_000_000 if width == 768 else 2_000_000
    chunk = chunk_shape(1024, [2 * width]).positions
    order = order_over(np.ones(num_tokens, np.bool_), chunk, memory_tokens=int(4e9) // (2 * width), batch_tokens=batch)
    assert order.num_windows > 1
    lanes = range(order.num_lanes)
    given = order.window(0, 1, lanes).tokens[order.shuffled(0, 1, lanes)]
    step = max(1, order.window_batches // 4)
    found = [len(np.unique(given[:, order.places_of(batch)] // 300)) for batch in range(0, order.window_batches, step)]
    ideal = expected_documents(np.bincount(np.arange(num_tokens) // 300), batch)
    assert least < np.mean(found) / ideal < 1.04
    in_order = len(np.unique(np.arange(batch) // 300))
    assert in_order / ideal < 0.04


def test_expected_documents_equals_the_mean_over_draws() -> None:
    sizes = np.array([1, 2, 50, 7, 0, 40])
    owners = np.repeat(np.arange(6), sizes)
    rng = np.random.default_rng(0)
    drawn = [len(np.unique(rng.choice(owners, 12, replace=False))) for _ in range(20_000)]
    assert expected_documents(sizes, 12) == pytest.approx(np.mean(drawn), abs=0.02)
    assert expected_documents(sizes, 100) == 5.0


def test_mixing_of_a_whole_view_is_that_of_a_full_shuffle(view: StoreView) -> None:
    mixing = measure_mixing(ShuffledBatches(view, batch_size=32, seed=0), num_batches=64)
    # Equal parts of lanes mix a little better than a uniform draw.
    assert 0.97 < mixing.ratio < 1.08


@pytest.mark.parametrize("memory_bytes", [30_000, 60_000])
def test_windows_mix_what_so_many_random_chunks_hold(memory_bytes: int, view: StoreView) -> None:
    batches = ShuffledBatches(view, batch_size=32, seed=0, memory_bytes=memory_bytes)
    order, bounds, documents = batches._order, view.store.chunk_bounds, view.store.documents().ravel()
    held = [len(order.window(0, number, range(order.num_lanes)).tokens) for number in range(order.num_windows)]
    assert len(held) > 1

    rng, possible = np.random.default_rng(0), []
    for _ in range(200):
        chunks = rng.permutation(len(bounds) - 1)
        flat = np.concatenate([np.arange(bounds[chunk], bounds[chunk + 1]) for chunk in chunks])
        sizes = np.bincount(documents[flat[view.mask.ravel()[flat]]][: held[0]])
        possible.append(expected_documents(sizes, 32))
    mixing = measure_mixing(batches, num_batches=64)
    assert 0.93 < mixing.documents / np.mean(possible) < 1.15
