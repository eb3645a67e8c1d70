"""Windows of a store in memory: the chunks of some lanes, each read once and left as it is stored."""

import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from torch import Tensor

from saekit.activations.codec import AnyArray
from saekit.activations.memory import aligned
from saekit.activations.order import EpochOrder, Indices, flat_of
from saekit.activations.store import ActivationStore

__all__ = ["LoadedWindow", "WindowReader"]

# Reads wait for the disk without holding the interpreter, so that several ask it for more at once. Where nothing is compiled, one thread
# reads as much of what lies in the page cache as two (0.6 us a token of 1,152 bytes against 1.0 on two cores): they wait for the interpreter.
_MAX_THREADS = 4
_PIECES = 4


_Kept = tuple[Indices, Indices, list[AnyArray]]
_NOTHING: _Kept = (np.empty(0, np.int64), np.empty(0, np.int64), [])
_Loading = tuple[tuple[Tensor, ...], Indices, list[Future[None]]]


class LoadedWindow(NamedTuple):
    """All tokens of a window's chunks."""

    stored: tuple[Tensor, ...]
    """`[n, width]` of each hook point, as they are stored."""
    order: Indices
    """`[lanes, ..]` which of them are given out, in this order."""


class WindowReader:
    """Reads one window after another; called from one thread. Of the windows read, the last two hold, what is before them is gone."""

    def __init__(self, store: ActivationStore, order: EpochOrder, lanes: range) -> None:
        """Reads nothing and starts no thread yet."""
        self._store = store
        self._order = order
        self._lanes = lanes
        self._threads = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="saekit-read")
        # Chunks that the next window begins with, ascending, where their tokens are, and in which arrays: each is read once.
        self._kept = _NOTHING
        # Rows and arrays of the last two windows.
        self._memory: list[tuple[int, list[AnyArray]]] = [(0, []), (0, [])]
        self._whole: _Loading | None = None

    def read(self, epoch: int, number: int) -> LoadedWindow:
        """Returns the lanes' tokens of a window.

        Raises:
            StoreError: a file that cannot be read, or has changed since it was written.
        """
        stored, places, reads = self._whole or self._load(epoch, number)
        order = places[self._order.shuffled(epoch, number, self._lanes)]
        wait(reads)
        try:
            for read in reads:
                read.result()
        except BaseException:
            # What the next window would begin with may not have been read.
            self._kept = _NOTHING
            raise
        if self._order.is_whole:
            # Every epoch gives out the same tokens of the one window, in another order.
            self._whole = stored, places, []
        return LoadedWindow(stored, order)

    def _load(self, epoch: int, number: int) -> _Loading:
        """Returns each hook point's tokens of the window's chunks, where among them the lanes' tokens are, and what still reads."""
        window = self._order.window(epoch, number, self._lanes)
        bounds = self._store.chunk_bounds
        kept, kept_places, kept_tokens = self._kept
        self._kept = _NOTHING
        is_kept = np.isin(kept, window.chunks)
        fresh = np.setdiff1d(window.chunks, kept, assume_unique=True)
        chunks = np.concatenate([kept[is_kept], fresh])
        ends = np.cumsum(bounds[chunks + 1] - bounds[chunks])
        starts = ends - (bounds[chunks + 1] - bounds[chunks])
        parts = self._store.parts
        arrays = self._arrays(int(ends[-1]))
        num_kept = len(chunks) - len(fresh)

        def read_some(some: slice) -> None:
            tokens = slice(int(starts[some][0]), int(ends[some][-1]))
            for part, array in zip(parts, arrays, strict=True):
                part.read_chunks(chunks[some], array[tokens])

        # More pieces than several threads: they end together, whatever else the cores do.
        pieces = _PIECES * self._threads if self._threads > 1 else 1
        edges = np.unique(np.linspace(num_kept, len(chunks), pieces + 1).astype(int)).tolist()
        reads = [self._pool.submit(read_some, slice(a, b)) for a, b in itertools.pairwise(edges)]
        if num_kept:
            held = kept_places[np.repeat(is_kept, bounds[kept + 1] - bounds[kept])]
            for array, tokens in zip(arrays, kept_tokens, strict=True):
                # Into its place at once; without a mode it would be checked first, and copied twice.
                np.take(tokens, held, axis=0, out=array[: len(held)], mode="clip")
        ascending = np.argsort(chunks)
        at = ascending[np.searchsorted(chunks[ascending], window.unfinished)]
        self._kept = window.unfinished, flat_of(at, np.append(0, ends)), arrays
        # By how much the place of a chunk's tokens differs from their index; of most chunks nothing is asked.
        shifts = np.empty(len(bounds) - 1, np.int64)
        shifts[chunks] = starts - bounds[chunks]
        places = window.tokens + shifts[np.searchsorted(bounds, window.tokens, side="right") - 1]
        stored = tuple(part.codec.to_tensor(array) for part, array in zip(parts, arrays, strict=True))
        return stored, places, reads

    def _arrays(self, tokens: int) -> list[AnyArray]:
        """Returns memory for a window; that of the window before the last, where it is large enough.

        The system clears new memory, which takes as long as reading into it.
        """
        self._memory.reverse()
        parts = self._store.parts
        if tokens > self._memory[0][0]:
            # A little more than is needed now: windows differ by a few chunks.
            room = tokens + tokens // 64
            self._memory[0] = 0, []
            arrays = [aligned(room, part.codec.width(part.d_in), part.codec.array) for part in parts]
            self._memory[0] = room, arrays
        return [array[:tokens] for array in self._memory[0][1]]

    def close(self) -> None:
        """Ends the threads and frees the memory; no window that was read may be used again."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._memory = [(0, []), (0, [])]
