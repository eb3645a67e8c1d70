"""Compiled reading of stores gives the bytes, the batches and the errors of the interpreter's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from saekit_kernels import _build

from saekit.activations import ActivationStore, ShuffledBatches
from saekit.activations.shardfile import ShardFile
from saekit.activations.windows import WindowReader
from saekit.errors import StoreError

LAYER = "model.layers.1"
WINDOWS = 30_000.0


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := _build.why_unavailable():
        pytest.skip(f"no compiled kernels: {reason}")
    monkeypatch.delenv("SAEKIT_KERNELS", raising=False)


def read_all(store: ActivationStore) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    chunks = np.arange(len(store.chunk_bounds) - 1)
    out = np.zeros((store.num_tokens, store.codec.width(store.d_in)), store.codec.array)
    store.read_chunks(chunks, out)
    return out


def batches_of(store: ActivationStore, memory_bytes: float) -> torch.Tensor:
    with ShuffledBatches(store.split(0.2)[0], batch_size=12, seed=0, memory_bytes=memory_bytes) as batches:
        return torch.cat([batches.next_batch() for _ in range(2 * batches.batches_per_epoch)])


@pytest.mark.parametrize("memory_bytes", [1e9, WINDOWS])
def test_bytes_and_batches_are_those_of_the_interpreter(
    memory_bytes: float, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ActivationStore.open(cached, LAYER)
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "read_chunks", None)
        found, batches = read_all(store), batches_of(store, memory_bytes)
    monkeypatch.setenv("SAEKIT_KERNELS", "cpu")
    assert np.array_equal(found, read_all(store))
    assert torch.equal(batches.view(torch.int32), batches_of(store, memory_bytes).view(torch.int32))


def test_many_shards_are_read_a_few_at_a_time(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore.open(cached, LAYER)
    expected = read_all(store)
    monkeypatch.setattr("saekit.activations.reader._SHARDS_A_CALL", 3)
    monkeypatch.setattr(ShardFile, "read_chunks", None)
    assert np.array_equal(read_all(store), expected)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_errors_are_those_of_the_interpreter(damage: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore.open(copied, LAYER)
    read_all(store)
    path = next(copied.rglob("shard-00001.zarr/activations/c/0/0/0"))
    with path.open("r+b") as file:
        if damage == "flip":
            file.seek(200)
            byte = file.read(1)[0]
            file.seek(200)
            file.write(bytes([byte ^ 1]))
        else:
            file.truncate(300)
    said = []
    for kernels in ("auto", "cpu"):
        monkeypatch.setenv("SAEKIT_KERNELS", kernels)
        with pytest.raises(StoreError, match="shard-00001") as error:
            read_all(store)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_after_an_error_windows_begin_with_nothing_unread(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks that a window shares with the one before are read again where reading that one failed."""
    store = ActivationStore.open(cached, LAYER)
    view = store.split(0.2)[0]
    with ShuffledBatches(view, batch_size=12, seed=0, memory_bytes=WINDOWS) as batches:
        order = batches._order
    lanes = range(order.num_lanes)
    assert order.num_windows > 2
    expected = []
    reader = WindowReader(store, order, lanes)
    for number in range(3):
        window = reader.read(0, number)
        expected.append(window.stored[0][torch.from_numpy(window.order.ravel())])
    reader.close()
    reader = WindowReader(store, order, lanes)
    reader.read(0, 0)

    def fail(chunks: object, out: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
        out[:] = 0
        raise StoreError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store, "read_chunks", fail)
        with pytest.raises(StoreError, match="gone"):
            reader.read(0, 1)
    for number in (1, 2):
        window = reader.read(0, number)
        assert torch.equal(window.stored[0][torch.from_numpy(window.order.ravel())], expected[number])
    reader.close()
