"""Globally mixed training batches from a store, the same for any number of ranks and after any resume."""

import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from saekit.activations.order import EpochOrder, Indices
from saekit.activations.source import read_position
from saekit.activations.view import StoreView
from saekit.errors import ConfigError, StoreError

__all__ = ["ShuffledBatches"]

# A store is read in runs of about this many bytes: SSDs and networks deliver them at nearly full speed, and they are small
# enough that one window holds pieces of thousands of documents.
_RUN_BYTES = 128 * 2**10


class ShuffledBatches:
    """Endless epochs of a view in random order, one slice of every global batch for each rank.

    An epoch is a permutation of the view cut into global batches of `batch_size * world_size` tokens; what is left over at
    its end, less than one global batch, is left out (another part in each epoch). Rank r of w gets the r-th of w equal
    slices, so the global batches are the same for every world size with the same global batch size.

    If the view fits `memory_bytes` in the stored dtype, it is read once and every epoch is one full permutation. If not,
    windows of half of `memory_bytes` are mixed while the next one is read in the background; `mixing` measures how far
    that is from a full permutation.

    Attributes:
        view: what is read.
        batch_size: tokens of this rank's batch.
        batches_per_epoch: global batches.
        epoch: of the next batch, from 0.
        batch: place of the next batch in its epoch, from 0.
    """

    def __init__(
        self,
        view: StoreView,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        memory_bytes: float = 4e9,
    ) -> None:
        """Reads no activations yet.

        Raises:
            ConfigError: sizes that are not positive, or a rank outside the world.
            StoreError: the view holds less than one global batch.
        """
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(
                f"batches: batch_size {batch_size}, rank {rank} of {world_size}, needs positive sizes and a rank below the"
                " world size"
            )
        self.view = view
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch_size = batch_size * world_size
        self.batches_per_epoch = view.num_tokens // self.global_batch_size
        if not self.batches_per_epoch:
            raise StoreError(
                f"batches: {view.num_tokens:,} tokens to train on, one batch over all ranks needs"
                f" {self.global_batch_size:,}; cache more tokens or lower training.batch_size"
            )
        self.epoch = 0
        self.batch = 0
        token_bytes = view.store.token_bytes
        fitting = int(memory_bytes) // token_bytes
        # While one window is given out, the next one is read: each has half of the memory.
        window_tokens = fitting if view.num_tokens <= fitting else max(self.global_batch_size, fitting // 2)
        self._order = EpochOrder(
            view.num_tokens,
            seed=seed,
            window_tokens=window_tokens,
            run_tokens=max(1, _RUN_BYTES // token_bytes),
            batch_tokens=self.global_batch_size,
        )
        self._loaded: dict[tuple[int, int], Future[Tensor]] = {}
        # Two threads: one prepares the next batch and may wait for the other, which reads windows.
        self._batch_pool = ThreadPoolExecutor(1, thread_name_prefix="saekit-batch")
        self._window_pool = ThreadPoolExecutor(1, thread_name_prefix="saekit-window")
        self._next: tuple[tuple[int, int], Future[Tensor]] | None = None

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.view.d_in

    @property
    def num_tokens(self) -> int:
        """Tokens of the view."""
        return self.view.num_tokens

    @property
    def tokens_read(self) -> int:
        """Tokens given out so far, over all ranks and epochs."""
        return (self.epoch * self.batches_per_epoch + self.batch) * self.global_batch_size

    def next_batch(self) -> Tensor:
        """Returns the next `[batch_size, d_in]` float32 batch of this rank."""
        at = (self.epoch, self.batch)
        prepared = self._next if self._next is not None and self._next[0] == at else self._prepare(*at)
        batch = prepared[1].result()
        self._advance()
        self._next = self._prepare(self.epoch, self.batch)
        return batch

    def batch_indices(self, epoch: int, batch: int) -> Indices:
        """Returns the flat indices in the store of a global batch, the ranks' slices one after another."""
        start = batch * self.global_batch_size
        pieces = self._pieces(epoch, start, start + self.global_batch_size)
        tokens = [self._order.window(number, epoch).tokens[at] for number, at in pieces]
        flat: Indices = self.view.indices[np.concatenate(tokens)]
        return flat

    def state_dict(self) -> dict[str, object]:
        """Returns the position and what it depends on, as JSON values; the same on every rank."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to the position of a source over the same tokens, seed and global batch size, on any number of ranks.

        Raises:
            StoreError: the state is of a source with other data or settings; the first differing one is named.
        """
        self.epoch, self.batch = read_position(state, self._identity)

    def close(self) -> None:
        """Ends the threads and frees the windows; `next_batch` must not be called again."""
        self._next = None
        for pool in (self._batch_pool, self._window_pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._loaded.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @functools.cached_property
    def _identity(self) -> dict[str, object]:
        return {
            "seed": self._order.seed,
            "global_batch_size": self.global_batch_size,
            "window_runs": self._order.window_runs,
            "run_tokens": self._order.run_tokens,
            "store": self.view.store.sha256,
            "hook_point": self.view.store.hook_point,
            "tokens": self.view.fingerprint,
        }

    def _advance(self) -> None:
        self.batch += 1
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    def _prepare(self, epoch: int, batch: int) -> tuple[tuple[int, int], Future[Tensor]]:
        return (epoch, batch), self._batch_pool.submit(self._read, epoch, batch)

    def _pieces(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, Indices]]:
        """Yields (window, places among its tokens) for the places start..stop of an epoch."""
        number = self._order.window_of(start, epoch)
        while start < stop:
            window = self._order.window(number, epoch)
            part = window.order[start - window.start : stop - window.start]
            yield number, part
            start, number = start + len(part), number + 1

    def _read(self, epoch: int, batch: int) -> Tensor:
        """Returns a batch of this rank; runs in the batch thread alone."""
        start = batch * self.global_batch_size + self.rank * self.batch_size
        parts = [
            self._activations(epoch, number)[torch.from_numpy(at)].to(torch.float32)
            for number, at in self._pieces(epoch, start, start + self.batch_size)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _activations(self, epoch: int, number: int) -> Tensor:
        """Returns the activations of a window, and has the window after it read."""
        if self._order.is_whole:
            # Every epoch gives out the same tokens of the one window, in another order.
            return self._load(0, 0).result()
        last = self._order.num_windows - 1
        following = (epoch, number + 1) if number < last else (epoch + 1, 0)
        for key in self._loaded.keys() - {(epoch, number), following}:
            del self._loaded[key]
        current = self._load(epoch, number)
        self._load(*following)
        return current.result()

    def _load(self, epoch: int, number: int) -> Future[Tensor]:
        key = (epoch, number)
        if key not in self._loaded:
            flat = self.view.indices[self._order.window(number, epoch).tokens]
            self._loaded[key] = self._window_pool.submit(self.view.store.read_tokens, flat)
        return self._loaded[key]
