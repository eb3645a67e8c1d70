"""The order in which the tokens of a view are given out, as arithmetic on a seed and an epoch."""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["EpochOrder", "Indices", "Window"]

# With fewer runs in a window than this many times the tokens of a batch, neighbours would meet in one batch too often.
_RUNS_PER_BATCH_TOKEN = 4

Indices = npt.NDArray[np.int64]


class Window(NamedTuple):
    """Tokens that are shuffled together."""

    start: int
    """Place in the epoch of its first token."""
    tokens: Indices
    """Places of its tokens in the view, ascending."""
    order: Indices
    """The order in which they are given out: `tokens[order[i]]` is at place `start + i` of the epoch."""


class EpochOrder:
    """The order of a view's tokens in each epoch, as arithmetic on (seed, epoch) alone; reads no activations.

    A view that fits one window is permuted as a whole. A larger one is cut into runs of neighbouring tokens; the runs are
    permuted, each window takes as many as fit, and its tokens are permuted.
    """

    def __init__(self, num_tokens: int, *, seed: int, window_tokens: int, run_tokens: int, batch_tokens: int) -> None:
        """Draws nothing yet.

        Args:
            window_tokens: how many tokens may be shuffled together.
            run_tokens: length of a run; shorter where a window would hold too few of them.
            batch_tokens: size of a global batch.
        """
        self.num_tokens = num_tokens
        self.seed = seed
        self.run_tokens = max(1, min(run_tokens, window_tokens // (_RUNS_PER_BATCH_TOKEN * batch_tokens)))
        runs = -(-num_tokens // self.run_tokens)
        self.window_runs = runs if num_tokens <= window_tokens else max(1, window_tokens // self.run_tokens)
        self.num_windows = -(-runs // self.window_runs)
        self._num_runs = runs
        # The runs of this epoch and of the next, whose first window is read ahead.
        self._runs = functools.lru_cache(maxsize=2)(self._draw_runs)
        self.window = functools.lru_cache(maxsize=2)(self._draw_window)

    @property
    def is_whole(self) -> bool:
        """Whether one window holds all tokens."""
        return self.num_windows == 1

    def window_of(self, place: int, epoch: int) -> int:
        """Returns the window that holds a place of the epoch."""
        guess = min(place // (self.window_runs * self.run_tokens), self.num_windows - 1)
        # The last run of the view may be short, so windows after the one that holds it start earlier than they seem.
        while guess + 1 < self.num_windows and place >= self.window_start(guess + 1, epoch):
            guess += 1
        return guess

    def window_start(self, window: int, epoch: int) -> int:
        """Returns the place in the epoch of a window's first token."""
        place = window * self.window_runs
        start = place * self.run_tokens
        short = self._num_runs * self.run_tokens - self.num_tokens
        if short and window and np.any(self._runs(epoch)[:place] == self._num_runs - 1):
            start -= short
        return min(start, self.num_tokens)

    def _draw_window(self, window: int, epoch: int) -> Window:
        first = window * self.window_runs
        runs = np.sort(self._runs(epoch)[first : first + self.window_runs])
        tokens = (runs[:, None] * self.run_tokens + np.arange(self.run_tokens)).ravel()
        tokens = tokens[tokens < self.num_tokens]
        order = np.random.default_rng([self.seed, epoch, 1, window]).permutation(len(tokens))
        return Window(self.window_start(window, epoch), tokens, order)

    def _draw_runs(self, epoch: int) -> Indices:
        return np.random.default_rng([self.seed, epoch, 0]).permutation(self._num_runs)
