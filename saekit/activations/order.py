"""The order in which the tokens of a view are given out, as arithmetic on a seed and an epoch."""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ORDER_VERSION", "EpochOrder", "Indices", "Window"]

ORDER_VERSION = 2
"""Of what is defined here; positions saved under another one mean other tokens."""

# Ranks up to this many read nothing twice.
_MAX_LANES = 512

Indices = npt.NDArray[np.int64]


class Window(NamedTuple):
    """Tokens of some lanes that are shuffled together, each lane's among themselves."""

    chunks: Indices
    """Chunks that hold them, ascending."""
    lanes: tuple[Indices, ...]
    """For each lane, its tokens: flat indices, not yet shuffled."""
    unfinished: Indices
    """Those of the chunks, ascending, whose other tokens the lane's next window begins with."""


class EpochOrder:
    """The order of a view's tokens in each epoch, as arithmetic on (seed, epoch) alone; reads no activations.

    The chunks of the store are permuted, and their tokens, one chunk after another, are cut into equal lanes. Every global batch
    takes equally many tokens of each lane, so that a rank that gives out a part of each batch reads its own lanes and no
    others, and the batches are the same for any number of ranks. A lane is gone through in windows, and the tokens of a window
    are permuted. A view that fits one window keeps its lanes in all epochs and has their tokens permuted.
    """

    def __init__(
        self, mask: npt.NDArray[np.bool_], bounds: Indices, *, seed: int, window_tokens: int, batch_tokens: int
    ) -> None:
        """Draws nothing yet.

        Args:
            mask: which tokens of the store, flat.
            bounds: `[chunks + 1]` flat index at which each chunk begins.
            window_tokens: how many tokens of all lanes may be shuffled together.
            batch_tokens: size of a global batch.
        """
        counts = np.add.reduceat(mask, bounds[:-1], dtype=np.int64)
        self._mask = mask
        self._bounds = bounds
        self._chunks = np.flatnonzero(counts)
        self._counts = counts[self._chunks]
        self.num_tokens = int(self._counts.sum())
        self.seed = seed
        self.batches = self.num_tokens // batch_tokens
        is_whole = self.num_tokens <= window_tokens
        # A lane's window of less than a chunk would have the chunk read for several of them.
        room = min(window_tokens, self.num_tokens) // int(np.diff(bounds).max())
        self.num_lanes = _largest_divisor(batch_tokens, max(1, min(_MAX_LANES, room)))
        self.lane_batch = batch_tokens // self.num_lanes
        self.window_batches = self.batches if is_whole else max(1, window_tokens // batch_tokens)
        self.num_windows = -(-self.batches // self.window_batches)
        # Those of this epoch and of the next, whose first window is read ahead.
        self._stream = functools.lru_cache(maxsize=2)(self._draw_stream)
        self.shuffled = functools.lru_cache(maxsize=2 * self.num_lanes)(self._draw_shuffle)

    @property
    def is_whole(self) -> bool:
        """Whether one window holds all tokens."""
        return self.num_windows == 1

    def window_of(self, batch: int) -> int:
        """Returns the window that a batch of an epoch takes its tokens from."""
        return batch // self.window_batches

    def lanes_of(self, start: int, stop: int) -> range:
        """Returns the lanes that the places start..stop of every global batch belong to."""
        return range(start // self.lane_batch, -(-stop // self.lane_batch))

    def places(self, epoch: int, batch: int, lane: int) -> Indices:
        """Returns which of the lane's tokens in the window of the batch the batch takes, `[lane_batch]`."""
        window = self.window_of(batch)
        start = (batch - window * self.window_batches) * self.lane_batch
        return self.shuffled(epoch, window, lane)[start : start + self.lane_batch]

    def window(self, epoch: int, number: int, lanes: range) -> Window:
        """Returns the tokens of a window in some of the lanes."""
        order, ends = self._stream(0 if self.is_whole else epoch)
        parts, chunks, unfinished = [], [], []
        for lane in lanes:
            start, stop = self._lane_span(number, lane)
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, stop, side="left"))
            own = self._chunks[order[first : last + 1]]
            before = int(ends[first - 1]) if first else 0
            parts.append(self._tokens(own)[start - before : stop - before])
            chunks.append(own)
            if ends[last] > stop and number < self.num_windows - 1:
                unfinished.append(int(own[-1]))
        return Window(np.unique(np.concatenate(chunks)), tuple(parts), np.unique(np.array(unfinished, np.int64)))

    def _lane_span(self, window: int, lane: int) -> tuple[int, int]:
        """Returns the places of a lane's window in the row of all tokens; the last window has what no batch takes as well."""
        begin = self.num_tokens * lane // self.num_lanes
        end = self.num_tokens * (lane + 1) // self.num_lanes
        size = self.window_batches * self.lane_batch
        return begin + window * size, end if window == self.num_windows - 1 else begin + (window + 1) * size

    def _tokens(self, chunks: Indices) -> Indices:
        """Returns the flat indices of the view's tokens in some chunks, one chunk after another."""
        flat = flat_of(chunks, self._bounds)
        return flat[self._mask[flat]]

    def _draw_stream(self, epoch: int) -> tuple[Indices, Indices]:
        """Returns the order of the chunks and where the tokens of each end in the row of all tokens."""
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self._chunks))
        return order, np.cumsum(self._counts[order])

    def _draw_shuffle(self, epoch: int, window: int, lane: int) -> Indices:
        start, stop = self._lane_span(window, lane)
        return np.random.default_rng([self.seed, epoch, 1, window, lane]).permutation(stop - start)


def flat_of(chunks: Indices, bounds: Indices) -> Indices:
    """Returns the flat indices of all tokens in some chunks, one chunk after another."""
    starts, sizes = bounds[chunks], bounds[chunks + 1] - bounds[chunks]
    before = np.cumsum(sizes) - sizes
    flat: Indices = np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)
    return flat


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
