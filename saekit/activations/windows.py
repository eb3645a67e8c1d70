"""Windows of a store in memory: the chunks of some lanes, each read once and left as it is stored."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

from saekit.activations.codec import AnyArray
from saekit.activations.order import EpochOrder, Indices, flat_of
from saekit.activations.store import ActivationStore

__all__ = ["LoadedWindow", "WindowReader"]

# Reads wait for the disk without holding the interpreter; more threads than this gain nothing on a local disk.
_MAX_THREADS = 4


class LoadedWindow(NamedTuple):
    """All tokens of a window's chunks."""

    stored: tuple[Tensor, ...]
    """`[n, width]` of each hook point, as they are stored."""
    places: tuple[Indices, ...]
    """For each lane, where its tokens are among them."""


class WindowReader:
    """Reads one window after another; called from one thread."""

    def __init__(self, store: ActivationStore, order: EpochOrder, lanes: range) -> None:
        """Reads nothing and starts no thread yet."""
        self._store = store
        self._order = order
        self._lanes = lanes
        self._threads = min(_MAX_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="saekit-read")
        # Chunks that the next window begins with, by number: each is read once an epoch.
        self._kept: dict[int, list[AnyArray]] = {}

    def read(self, epoch: int, number: int) -> LoadedWindow:
        """Returns the lanes' tokens of a window.

        Raises:
            StoreError: a file that cannot be read, or has changed since it was written.
        """
        window = self._order.window(epoch, number, self._lanes)
        bounds, chunks = self._store.chunk_bounds, window.chunks
        ends = np.cumsum(bounds[chunks + 1] - bounds[chunks])
        parts = self._store.parts
        arrays = [np.empty((int(ends[-1]), part.codec.width(part.d_in)), part.codec.array) for part in parts]
        starts = np.append(0, ends[:-1])

        def read_some(some: slice) -> None:
            for chunk, start, end in zip(
                chunks[some].tolist(), starts[some].tolist(), ends[some].tolist(), strict=True
            ):
                kept = self._kept.get(chunk)
                for place, (part, array) in enumerate(zip(parts, arrays, strict=True)):
                    if kept is None:
                        part.read_chunk(chunk, array[start:end])
                    else:
                        array[start:end] = kept[place]

        edges = np.linspace(0, len(chunks), self._threads + 1).astype(int).tolist()
        list(self._pool.map(read_some, [slice(a, b) for a, b in itertools.pairwise(edges)]))
        at = np.searchsorted(chunks, window.unfinished).tolist()
        self._kept = {
            int(chunks[place]): [array[starts[place] : ends[place]].copy() for array in arrays] for place in at
        }
        flat = flat_of(chunks, bounds)
        places = tuple(np.searchsorted(flat, tokens) for tokens in window.lanes)
        return LoadedWindow(
            tuple(part.codec.to_tensor(array) for part, array in zip(parts, arrays, strict=True)), places
        )

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
