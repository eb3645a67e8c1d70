"""Globally mixed training batches from a store, the same for any number of ranks and after any resume."""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from saekit_kernels.stored import gather_rows
from torch import Tensor

from saekit.activations.memory import TensorMemory
from saekit.activations.order import ORDER_VERSION, EpochOrder, Indices
from saekit.activations.source import read_position
from saekit.activations.view import StoreView
from saekit.activations.windows import LoadedWindow, WindowReader
from saekit.errors import ConfigError, StoreError

__all__ = ["ShuffledBatches"]

# Fewer pieces have the batch's thread wait for the interpreter less often: measured beside a thread that reads.
_DECODED_BYTES = 2 * 2**20


class ShuffledBatches:
    """Endless epochs of a view in random order, one slice of every global batch for each rank.

    An epoch is a permutation of the view cut into global batches of `batch_size * world_size` tokens; what is left over at
    its end, less than one global batch, is left out (another part in each epoch). Rank r of w gets the r-th of w equal
    slices, so the global batches are the same for every world size with the same global batch size; it reads and holds
    about a w-th of the view (`EpochOrder` says how that goes together).

    If the view fits `memory_bytes` as it is stored, it is read once. If not, windows of half of `memory_bytes` are mixed while
    the next one is read in the background, each chunk once an epoch (once more where one lane's tokens end in it and
    another's begin); `measure_mixing` says how far that is from a full shuffle.

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
        device: torch.device | str = "cpu",
        num_epochs: int | None = None,
    ) -> None:
        """Reads no activations yet.

        Args:
            view: tokens, at least one global batch of them.
            batch_size: of this rank.
            seed: of the order.
            rank: of this process.
            world_size: number of processes.
            memory_bytes: for the windows of all ranks together; part of the order.
            device: where batches are wanted. A GPU gets them as they are stored, from pinned memory, and decodes them itself.
            num_epochs: after which nothing is read ahead; None = there is always a next one.

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
        self._stores = view.store.parts
        self._memory = TensorMemory(batch_size, view.d_in)
        self._device = torch.device(device)
        self._num_epochs = num_epochs
        self._order = EpochOrder(
            view.mask.ravel(),
            view.store.chunk_bounds,
            seed=seed,
            memory_tokens=int(memory_bytes) // view.store.token_bytes,
            batch_tokens=self.global_batch_size,
        )
        self._lanes = self._order.lanes_of(rank * batch_size, (rank + 1) * batch_size)
        self._windows = WindowReader(view.store, self._order, self._lanes)
        self._loaded: dict[tuple[int, int], Future[LoadedWindow]] = {}
        # Two threads: one prepares the next batch and may wait for the other, which has windows read.
        self._batch_pool = ThreadPoolExecutor(1, thread_name_prefix="saekit-batch")
        self._window_pool = ThreadPoolExecutor(1, thread_name_prefix="saekit-window")
        self._next: tuple[tuple[int, int], Future[list[Tensor]]] | None = None

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

    @property
    def is_in_last_window(self) -> bool:
        """Whether the next batch is of the last window of its epoch."""
        return self._order.window_of(self.batch) == self._order.num_windows - 1

    def next_batch(self) -> Tensor:
        """Returns the next `[batch_size, d_in]` float32 batch of this rank, on `device`."""
        at = (self.epoch, self.batch)
        prepared = self._next if self._next is not None and self._next[0] == at else self._prepare(*at)
        parts = prepared[1].result()
        self._advance()
        self.read_ahead()
        if self._device.type == "cuda":
            on_device = [part.to(self._device, non_blocking=True) for part in parts]
            parts = [
                store.codec.decode(part).to(torch.float32) for store, part in zip(self._stores, on_device, strict=True)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def read_ahead(self) -> None:
        """Has the next batch read in the background."""
        self._next = self._prepare(self.epoch, self.batch) if self._is_wanted(self.epoch) else None

    def batch_indices(self, epoch: int, batch: int) -> Indices:
        """Returns the flat indices in the store of a global batch, the ranks' slices one after another."""
        number, lanes = self._order.window_of(batch), range(self._order.num_lanes)
        places = self._order.shuffled(epoch, number, lanes)[:, self._order.places_of(batch)]
        flat: Indices = self._order.window(epoch, number, lanes).tokens[places.ravel()]
        return flat

    def state_dict(self) -> dict[str, object]:
        """Returns the position and what it depends on, as JSON values; the same on every rank."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to the position of a source over the same tokens, seed and global batch size, on any number of ranks.

        Raises:
            StoreError: the state is of a source with other data or settings; the first differing one is named.
        """
        if (found := state.get("order", 1)) != ORDER_VERSION:
            raise StoreError(
                f"batches: saved under order {found!r} of the tokens, this version gives them out in order {ORDER_VERSION};"
                " train into a new folder"
            )
        self.epoch, self.batch = read_position(state, self._identity)

    def close(self) -> None:
        """Ends the threads and frees the windows; `next_batch` must not be called again."""
        self._next = None
        for pool in (self._batch_pool, self._window_pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._windows.close()
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
            "order": ORDER_VERSION,
            "seed": self._order.seed,
            "global_batch_size": self.global_batch_size,
            "store": self.view.store.sha256,
            "hook_point": self.view.store.hook_point,
            "tokens": self.view.fingerprint,
            "window_batches": self._order.window_batches,
            "lanes": self._order.num_lanes,
        }

    def _is_wanted(self, epoch: int) -> bool:
        return self._num_epochs is None or epoch < self._num_epochs

    def _advance(self) -> None:
        self.batch += 1
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0

    def _prepare(self, epoch: int, batch: int) -> tuple[tuple[int, int], Future[list[Tensor]]]:
        return (epoch, batch), self._batch_pool.submit(self._read, epoch, batch)

    def _read(self, epoch: int, batch: int) -> list[Tensor]:
        """Returns a batch of this rank, for a GPU each hook point's part as it is stored; runs in the batch thread alone."""
        window = self._window(epoch, self._order.window_of(batch))
        places = window.order[:, self._order.places_of(batch)].ravel()
        # The first of the lanes may begin with another rank's tokens.
        start = self.rank * self.batch_size - self._lanes.start * self._order.lane_batch
        index = torch.from_numpy(places[start : start + self.batch_size])
        if self._device.type != "cuda":
            return [self._decoded(window, index)]
        # torch keeps pinned memory for the next ones once the copies from it are done.
        pinned = [part.new_empty(self.batch_size, part.shape[1], pin_memory=True) for part in window.stored]
        return [torch.index_select(part, 0, index, out=out) for part, out in zip(window.stored, pinned, strict=True)]

    def _decoded(self, window: LoadedWindow, index: Tensor) -> Tensor:
        """Returns `[n, D]` float32 of some tokens of a window."""
        out = self._memory.take()
        columns = torch.split(out, [store.d_in for store in self._stores], dim=1)
        for store, part, target in zip(self._stores, window.stored, columns, strict=True):
            if not store.codec.is_quantised and gather_rows(part, index, target):
                continue
            # So many at a time that they are still near the processor when they are decoded.
            step = max(1, _DECODED_BYTES // (4 * store.d_in))
            for some, rows in zip(torch.split(index, step), torch.split(target, step), strict=True):
                rows.copy_(store.codec.decode(part.index_select(0, some)))
        return out

    def _window(self, epoch: int, number: int) -> LoadedWindow:
        """Returns a window, and has the window after it read."""
        following = (epoch, number + 1) if number < self._order.num_windows - 1 else (epoch + 1, 0)
        for key in self._loaded.keys() - {(epoch, number), following}:
            del self._loaded[key]
        current = self._load(epoch, number)
        if self._is_wanted(following[0]):
            self._load(*following)
        return current.result()

    def _load(self, epoch: int, number: int) -> Future[LoadedWindow]:
        key = (epoch, number)
        if key not in self._loaded:
            self._loaded[key] = self._window_pool.submit(self._windows.read, epoch, number)
        return self._loaded[key]
