"""The order in which the tokens of a view are given out, as arithmetic on a seed and an epoch."""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ORDER_VERSION", "EpochOrder", "Indices", "Window", "flat_of"]

ORDER_VERSION = 2
"""Of what is defined here; positions saved under another one mean other tokens."""

_MAX_LANES = 8192
# Drawn by one generator: whoever needs one of them draws all, and a generator takes longer to make than many places to draw.
_DRAWN_LANES = 64
# A lane's window begins and ends in the middle of a chunk: with fewer chunks, what is kept of those would fill the memory.
_CHUNKS_PER_LANE = 3

Indices = npt.NDArray[np.int64]


class Window(NamedTuple):
    """Tokens of some lanes that are shuffled together, each lane's among themselves."""

    chunks: Indices
    """Chunks that hold them, ascending."""
    tokens: Indices
    """Flat indices, one lane after another, not yet shuffled."""
    sizes: Indices
    """Tokens of each lane."""
    unfinished: Indices
    """Those of the chunks, ascending, whose other tokens the lane's next window begins with."""


class EpochOrder:
    """The order of a view's tokens in each epoch, as arithmetic on (seed, epoch) alone; reads no activations.

    The chunks of the store are permuted, and their tokens, one chunk after another, are cut into equal lanes. Every global batch
    takes equally many tokens of each lane, so that a rank that gives out a part of each batch reads its own lanes and no
    others, and the batches are the same for any number of ranks. Many lanes also keep neighbours apart: two tokens of a chunk
    meet in a batch only where it takes several of one lane. A lane is gone through in windows, and the tokens of a window are
    permuted. A view that fits one window keeps its lanes in all epochs and has their tokens permuted.
    """

    def __init__(
        self, mask: npt.NDArray[np.bool_], bounds: Indices, *, seed: int, memory_tokens: int, batch_tokens: int
    ) -> None:
        """Draws nothing yet.

        Args:
            mask: which tokens of the store, flat.
            bounds: `[chunks + 1]` flat index at which each chunk begins.
            memory_tokens: how many tokens of all lanes may be in memory.
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
        is_whole = self.num_tokens <= memory_tokens
        # While one window is given out, the next one is read.
        window = self.num_tokens if is_whole else memory_tokens // 2
        chunk = int(np.diff(bounds).max())
        most = min(_MAX_LANES, window // (_CHUNKS_PER_LANE * chunk))
        self.num_lanes = _largest_divisor(batch_tokens, max(1, most))
        self.lane_batch = batch_tokens // self.num_lanes
        # Besides its tokens, a window holds the rest of each lane's last chunk.
        room = window - self.num_lanes * chunk
        self.window_batches = self.batches if is_whole else max(1, room // batch_tokens)
        self.num_windows = -(-self.batches // self.window_batches)
        # Those of this epoch and of the next, whose first window is read ahead.
        self._stream = functools.lru_cache(maxsize=2)(self._draw_stream)

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

    def places_of(self, batch: int) -> slice:
        """Returns which columns of `shuffled` a batch takes, of every lane."""
        start = batch % self.window_batches * self.lane_batch
        return slice(start, start + self.lane_batch)

    def window(self, epoch: int, number: int, lanes: range) -> Window:
        """Returns the tokens of a window in some of the lanes."""
        order, ends = self._stream(0 if self.is_whole else epoch)
        starts, stops = self._spans(number, lanes)
        first = np.searchsorted(ends, starts, side="right")
        last = np.searchsorted(ends, stops, side="left")
        chunks = self._chunks[order[_ranges(first, last + 1 - first)]]
        # The tokens of whole chunks, of which each lane leaves out some at both ends.
        before = np.append(0, ends)[first]
        held = ends[last] - before
        tokens = flat_of(chunks, self._bounds)
        tokens = tokens[self._mask[tokens]]
        tokens = tokens[_ranges(np.cumsum(held) - held + starts - before, stops - starts)]
        is_cut = (ends[last] > stops) & (number < self.num_windows - 1)
        return Window(np.unique(chunks), tokens, stops - starts, np.unique(self._chunks[order[last[is_cut]]]))

    def shuffled(self, epoch: int, number: int, lanes: range) -> Indices:
        """Returns the order of a window's tokens, `[lanes, batches of the window * lane_batch]` places in `Window.tokens`."""
        starts, stops = self._spans(number, lanes)
        sizes = stops - starts
        batches = min(self.window_batches, self.batches - number * self.window_batches)
        out = np.empty((len(lanes), batches * self.lane_batch), np.int64)
        places = np.arange(out.shape[1])
        for block in range(lanes.start // _DRAWN_LANES, -(-lanes.stop // _DRAWN_LANES)):
            drawn = self._draw_lanes(epoch, number, block)
            first = block * _DRAWN_LANES
            own = range(max(first, lanes.start), min(first + len(drawn), lanes.stop))
            rows = slice(own.start - lanes.start, own.stop - lanes.start)
            some = drawn[own.start - first : own.stop - first]
            # Of a lane that has a token less than others, what the last place would be is left out.
            is_short = sizes[rows] < drawn.shape[1]
            out[rows] = some[:, : out.shape[1]]
            if is_short.any():
                short = some[is_short]
                skipped = places >= np.argmax(short == drawn.shape[1] - 1, axis=1)[:, None]
                out[rows][is_short] = np.take_along_axis(short, places + skipped, axis=1)
        out += (np.cumsum(sizes) - sizes)[:, None]
        return out

    def _draw_lanes(self, epoch: int, number: int, block: int) -> Indices:
        """Returns a permutation of a window's places for each lane of a block, `[lanes, places of the longest lane]`."""
        lanes = range(block * _DRAWN_LANES, min((block + 1) * _DRAWN_LANES, self.num_lanes))
        starts, stops = self._spans(number, range(self.num_lanes))
        places = np.tile(np.arange(int((stops - starts).max())), (len(lanes), 1))
        drawn: Indices = np.random.default_rng([self.seed, epoch, 1, number, block]).permuted(places, axis=1)
        return drawn

    def _spans(self, window: int, lanes: range) -> tuple[Indices, Indices]:
        """Returns where in the row of all tokens each lane's window begins and ends; the last one has what no batch takes as well."""
        edges = self.num_tokens * np.arange(lanes.start, lanes.stop + 1) // self.num_lanes
        size = self.window_batches * self.lane_batch
        starts = edges[:-1] + window * size
        return starts, edges[1:] if window == self.num_windows - 1 else starts + size

    def _draw_stream(self, epoch: int) -> tuple[Indices, Indices]:
        """Returns the order of the chunks and where the tokens of each end in the row of all tokens."""
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self._chunks))
        return order, np.cumsum(self._counts[order])


def flat_of(chunks: Indices, bounds: Indices) -> Indices:
    """Returns the flat indices of all tokens in some chunks, one chunk after another."""
    return _ranges(bounds[chunks], bounds[chunks + 1] - bounds[chunks])


def _ranges(starts: Indices, sizes: Indices) -> Indices:
    """Returns the whole numbers from each start on, so many of each, one after another."""
    before = np.cumsum(sizes) - sizes
    found: Indices = np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)
    return found


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
