"""One implementation of writing and reading activations, driven over pipes by scripts/bench_store; runs in that implementation's environment.

    python bench_store_worker.py NAME ACTIVATIONS.npy

Answers each line on its input, a JSON object, with one line of JSON: seconds and CPU seconds of what it was asked for.
`{"do": "write", "folder": F, "settings": S}` writes all activations into F, to the disk; `{"do": "read", "folder": F, "how": H}`
reads what is there.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from torch import Tensor

CONTEXT_LEN = 128
BATCH_SIZE = 4096
SHARD_ROWS = 256

Array = np.ndarray[Any, Any]


class Implementation(Protocol):
    """Something that stores activations."""

    def prepare(self, settings: dict[str, Any]) -> None:
        """What is not timed: activations in the form in which they are stored."""

    def write(self, folder: Path) -> None:
        """Writes all activations."""

    def read(self, folder: Path, how: str) -> Iterable[Tensor]:
        """Opens what is in the folder; what is iterated over is timed."""


class Memmap:
    """One raw file of bfloat16, written and read in order."""

    def __init__(self, x: Array) -> None:
        self._shape = x.shape
        self._x = x

    def prepare(self, settings: dict[str, Any]) -> None:
        self._rows = torch.from_numpy(self._x).to(torch.bfloat16).view(torch.uint16).numpy()

    def write(self, folder: Path) -> None:
        file = np.memmap(folder / "raw", dtype=np.uint16, mode="w+", shape=self._shape)
        file[...] = self._rows
        file.flush()

    def read(self, folder: Path, how: str) -> Iterator[Tensor]:
        # Copy on write, of which there is none: torch warns of arrays that cannot be written.
        file = np.memmap(folder / "raw", dtype=np.uint16, mode="c", shape=self._shape)
        if how == "batches":
            # Once before, so that all of the file is mapped already.
            np.add.reduce(file[:, 0])
        return self._in_order(file, how)

    def _in_order(self, file: Array, how: str) -> Iterator[Tensor]:
        for start in range(0, len(file), BATCH_SIZE):
            part = file[start : start + BATCH_SIZE]
            if how == "raw":
                yield torch.from_numpy(np.array(part))
            else:
                yield torch.from_numpy(part).view(torch.bfloat16).to(torch.float32)


class Saekit:
    """Shard files, written and committed one by one, read in globally mixed batches, through two windows of a quarter of the store."""

    def __init__(self, x: Array) -> None:
        self._x = x

    def prepare(self, settings: dict[str, Any]) -> None:
        from saekit.activations.codec import CODECS

        self._codec, self._settings = CODECS[settings["dtype"]], settings
        coded = self._codec.to_array(self._codec.encode(torch.from_numpy(self._x)))
        self._rows = coded.reshape(-1, CONTEXT_LEN, coded.shape[1])

    def write(self, folder: Path) -> None:
        from saekit.activations.chunks import chunk_shape
        from saekit.activations.codec import token_bytes
        from saekit.activations.layout import shard_spans
        from saekit.activations.writer import Shard, write_shard

        d_in = self._x.shape[1]
        norm = np.zeros(self._rows.shape[:2], np.float32)
        for span in shard_spans(len(self._rows), SHARD_ROWS):
            part = slice(span.first_row, span.first_row + span.num_rows)
            write_shard(
                Shard(
                    folder=folder,
                    cache="0" * 64,
                    hook_point="bench",
                    span=span,
                    dtype=self._codec.name,
                    compression=self._settings["compression"],
                    chunk=chunk_shape(CONTEXT_LEN, [token_bytes(self._codec.name, d_in)]),
                    d_in=d_in,
                    activations=self._rows[part],
                    norm=norm[part],
                )
            )

    def read(self, folder: Path, how: str) -> Iterable[Tensor]:
        from saekit.activations import ShuffledBatches, StoreView
        from saekit.activations.windows import WindowReader

        store = _opened(folder)
        view = StoreView(store, np.ones((store.num_rows, CONTEXT_LEN), np.bool_))
        batches = ShuffledBatches(
            view, batch_size=BATCH_SIZE, seed=0, memory_bytes=store.num_tokens * store.token_bytes / 2
        )
        if how == "raw":
            order = batches._order
            reader = WindowReader(store, order, range(order.num_lanes))
            for number in range(2):
                reader.read(0, number)
            return (reader.read(1, number).stored[0] for number in range(order.num_windows))
        if how == "chunks":
            return _chunks(store)
        # One epoch before, as in a training: what is timed begins with a window that was read ahead, and ends with reading ahead.
        for _ in range(batches.batches_per_epoch if how == "batches" else 0):
            batches.next_batch()
        return (batches.next_batch() for _ in range(batches.batches_per_epoch))


def _opened(folder: Path) -> Any:
    """Returns a store without model and text around it."""
    from saekit.activations import ActivationStore
    from saekit.activations.layout import ShardRecord, read_record
    from saekit.activations.reader import ShardReader

    records = [read_record(path, ShardRecord) for path in sorted(folder.glob("shard-*.json"))]
    shards = [record for record in records if record is not None]
    store = ActivationStore.__new__(ActivationStore)
    store._reader = ShardReader(folder, shards, context_len=CONTEXT_LEN)
    store.d_in, store.dtype, store.hook_point = shards[0].d_in, shards[0].dtype, "bench"
    store.context_len, store.num_rows = CONTEXT_LEN, store._reader.num_rows
    store.num_tokens = store.num_rows * CONTEXT_LEN
    return store


def _chunks(store: Any) -> Iterator[Tensor]:
    """Yields every chunk, one by one, in random order."""
    bounds = store.chunk_bounds
    for chunk in np.random.default_rng(0).permutation(len(bounds) - 1):
        out = np.empty((bounds[chunk + 1] - bounds[chunk], store.codec.width(store.d_in)), store.codec.array)
        store.read_chunks(np.array([chunk]), out)
        yield torch.from_numpy(out)


class Zarr(Saekit):
    """What saekit wrote, read by zarr's own Python pipeline: the same chunks in the same order, an eighth of them."""

    def read(self, folder: Path, how: str) -> Iterator[Tensor]:
        import zarr

        arrays = [zarr.open_group(path, mode="r")["activations"] for path in sorted(folder.glob("shard-*.zarr"))]
        step = arrays[0].chunks[1]  # type: ignore[union-attr]  # arrays, never groups
        places = [
            (array, row, position)
            for array in arrays
            for row in range(array.shape[0])  # type: ignore[union-attr]
            for position in range(0, CONTEXT_LEN, step)
        ]
        chosen = np.random.default_rng(0).permutation(len(places))[: len(places) // 8]
        for place in chosen:
            array, row, position = places[place]
            yield torch.from_numpy(np.asarray(array[row, position : position + step]))


class SAELens:
    """SAELens' runner that caches activations, fed with them instead of a model, and its activations store."""

    def __init__(self, x: Array) -> None:
        self._x = x

    def prepare(self, settings: dict[str, Any]) -> None:
        self._dtype = settings["dtype"]
        self._tensor = torch.from_numpy(self._x).to(getattr(torch, self._dtype))

    def write(self, folder: Path) -> None:
        module = importlib.import_module("sae_lens.cache_activations_runner")
        rows = len(self._x) // CONTEXT_LEN
        config = module.CacheActivationsRunnerConfig(
            dataset_path="bench",
            model_name="bench",
            model_batch_size=32,
            hook_name="bench",
            d_in=self._x.shape[1],
            training_tokens=rows * CONTEXT_LEN,
            context_size=CONTEXT_LEN,
            new_cached_activations_path=str(folder / "cache"),
            dtype=self._dtype,
            device="cpu",
            shuffle=False,
            # Files of as many tokens as the others'.
            buffer_size_gb=SHARD_ROWS * CONTEXT_LEN * (self._x.shape[1] * self._tensor.itemsize + 0.5) / 1e9,
        )
        runner = module.CacheActivationsRunner.__new__(module.CacheActivationsRunner)
        runner.cfg, runner.context_size = config, CONTEXT_LEN
        column = module.Array2D(shape=(CONTEXT_LEN, config.d_in), dtype=self._dtype)
        runner.features = module.Features({"bench": column})
        parts = iter(torch.split(self._tensor, 32 * CONTEXT_LEN))
        # Stands in for the model.
        runner.activations_store = SimpleNamespace(get_raw_llm_batch=lambda: (next(parts), None))
        runner.run()
        # The disk has what was written, as numpy.memmap.flush and saekit see to it.
        _each_file(folder, os.fsync)

    def read(self, folder: Path, how: str) -> Iterator[Tensor]:
        module = importlib.import_module("sae_lens.training.activations_store")
        store = module.ActivationsStore(
            model=None,
            dataset=None,
            streaming=False,
            hook_name="bench",
            hook_head_index=None,
            context_size=CONTEXT_LEN,
            d_in=self._x.shape[1],
            # Sequences: half of the activations, as much as the others hold in memory.
            n_batches_in_buffer=len(self._x) // CONTEXT_LEN // 2,
            total_training_tokens=len(self._x),
            store_batch_size_prompts=32,
            train_batch_size_tokens=BATCH_SIZE,
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(folder / "cache"),
        )
        for _ in range(len(self._x) // BATCH_SIZE):
            yield store.next_batch()


class Llamascopium:
    """llamascopium's writer of safetensors files, and its factory of shuffled batches."""

    def __init__(self, x: Array) -> None:
        self._x = x

    def prepare(self, settings: dict[str, Any]) -> None:
        self._rows = torch.from_numpy(self._x).to(torch.bfloat16).reshape(-1, CONTEXT_LEN, self._x.shape[1])

    def write(self, folder: Path) -> None:
        module = importlib.import_module("llamascopium.activation.writer")
        config = module.ActivationWriterConfig(hook_points=["bench"], cache_dir=str(folder))
        names = ("tokens", "mask", "attention_mask")
        ones = {name: torch.ones(32, CONTEXT_LEN, dtype=torch.int64) for name in names}
        stream = (
            {"bench": rows, **{name: ones[name][: len(rows)] for name in names}} for rows in torch.split(self._rows, 32)
        )
        module.ActivationWriter(config).process(stream)
        # The disk has what was written, as numpy.memmap.flush and saekit see to it.
        _each_file(folder, os.fsync)

    def read(self, folder: Path, how: str) -> Iterator[Tensor]:
        factory = importlib.import_module("llamascopium.activation.factory")
        source = factory.ActivationFactoryActivationsSource(
            name="bench", path=str(folder), num_workers=0, prefetch=None
        )
        config = factory.ActivationFactoryConfig(
            sources=[source],
            target=factory.ActivationFactoryTarget.ACTIVATIONS_1D,
            hook_points=["bench"],
            batch_size=BATCH_SIZE,
            buffer_size=len(self._x) // 2,
            override_dtype=torch.float32,
        )
        return (batch["bench"] for batch in factory.ActivationFactory(config).process())


def _drop(handle: int) -> None:
    """Asks the system to forget the file's pages."""
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _each_file(folder: Path, function: Callable[[int], None]) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                function(opened.fileno())


IMPLEMENTATIONS: dict[str, tuple[Callable[[Array], Implementation], str]] = {
    "numpy.memmap": (Memmap, "numpy"),
    "saekit": (Saekit, "saekit"),
    "zarr": (Zarr, "zarr"),
    "sae-lens": (SAELens, "sae-lens"),
    "llamascopium": (Llamascopium, "llamascopium"),
}


def answer(implementation: Implementation, asked: dict[str, Any]) -> dict[str, float]:
    """Does what one line asks for."""
    folder = Path(asked["folder"])
    if asked["do"] == "write":
        implementation.prepare(asked["settings"])
        started, cpu_started = time.perf_counter(), time.process_time()
        implementation.write(folder)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": size}
    batches = iter(implementation.read(folder, asked["how"]))
    if asked["drop"]:
        _each_file(folder, _drop)
    tokens, sequences = 0, []
    started, cpu_started = time.perf_counter(), time.process_time()
    for batch in batches:
        tokens += len(batch)
        if asked["marked"]:
            # The first two numbers of every activation say which sequence it is of.
            sequences.append(len(np.unique((batch[:, 0] * 128 + batch[:, 1]).numpy())))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": float(tokens)}
    return found | ({"sequences": float(np.mean(sequences))} if sequences else {})


def main(answers: TextIO) -> None:
    """Answers one line after another."""
    name, path = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    factory, package = IMPLEMENTATIONS[name]
    implementation = factory(np.load(path, mmap_mode="c"))
    print(json.dumps({"version": importlib.metadata.version(package)}), file=answers, flush=True)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            found = answer(implementation, json.loads(line))
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.stdout)
