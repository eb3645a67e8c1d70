"""Mixed training batches from a ring, segment after segment, the same for any number of ranks and after any resume."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from saekit.activations.filler import FillerJob
from saekit.activations.fillers import Fillers
from saekit.activations.mixing import measure_mixing
from saekit.activations.order import ORDER_VERSION
from saekit.activations.ring import LedgerEntry, Ring
from saekit.activations.segment import open_segment
from saekit.activations.shuffle import ShuffledBatches
from saekit.activations.source import read_position
from saekit.activations.store import ActivationStore
from saekit.activations.view import StoreView

__all__ = ["RingBatches", "RingView"]

POLL_SECONDS = 0.05


class RingView(StoreView):
    """The training tokens of a ring.

    As a view it holds the training tokens of the cache that stays, on which the start and the end of a training are measured.

    Attributes:
        ring: whose activations are trained on.
    """

    def __init__(self, kept: StoreView, ring: Ring) -> None:
        """Reads nothing.

        Args:
            kept: training tokens of the cache beside the ring, at the hook points that are read.
            ring: beside that cache.
        """
        super().__init__(kept.store, kept.mask, origin=kept.origin)
        self.ring = ring

    @property
    def fingerprint(self) -> str:
        """Identity of the ring: which tokens these are."""
        return self.ring.identity


class _Opened(NamedTuple):
    """A segment that is read."""

    number: int
    batches: ShuffledBatches | None
    """None where it holds less than a batch."""
    entry: LedgerEntry


class RingBatches:
    """One pass over each segment in random order, each token once, one slice of every global batch for each rank.

    A batch is of one segment: what is left over at the end of a segment, less than one global batch, is left out. The order within a
    segment is that of `ShuffledBatches`, with another seed for each.

    Attributes:
        segment: of the next batch, from 0.
        batch: place of the next batch in its segment, from 0.
        when_empty: is told of a segment that holds less than a batch, and so was passed over.
    """

    def __init__(
        self,
        ring: Ring,
        parts: Sequence[ActivationStore],
        fillers: Fillers,
        *,
        batch_size: int,
        num_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        memory_bytes: float = 4e9,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Reads nothing and has nothing made yet.

        Args:
            ring: what is read.
            parts: hook points, side by side: the stores of the cache that stays.
            fillers: who fill the ring; they are started with the first batch.
            batch_size: of this rank.
            num_tokens: that are wanted in all, over all ranks.
            seed: of the order.
            rank: of this process.
            world_size: number of processes.
            memory_bytes: for the windows of all ranks together; part of the order.
            device: where batches are wanted.
            say: is told how well batches mix, and when the text begins again.
        """
        self.ring = ring
        self.segment = 0
        self.batch = 0
        self.when_empty: Callable[[int], None] = lambda _: None
        self.global_batch_size = batch_size * world_size
        self._parts = tuple(parts)
        self._fillers = fillers
        self._batch_size = batch_size
        self._num_tokens = num_tokens
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        # The last window of one segment and the first one of the next are in memory at the same time.
        # Counted at all hook points, so that the order does not depend on which of them are read.
        self._memory_tokens = int(memory_bytes) // 2 // ring.token_bytes
        self._device = device
        self._say = say
        self._is_started = self._has_told = False
        self._passes = 0
        self._opened: _Opened | None = None
        self._following: tuple[int, Future[_Opened]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saekit-segment")

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return sum(part.d_in for part in self._parts)

    def next_batch(self) -> Tensor:
        """Returns the next `[batch_size, d_in]` float32 batch of this rank, once its segment is whole.

        Raises:
            ResourceError: the ring is not being filled any more; says why.
            StoreError: a file that cannot be read, or has changed since it was written.
        """
        while (batches := self._segment_batches(self.segment)) is None:
            self.when_empty(self.segment)
            self.segment, self.batch = self.segment + 1, 0
        batches.batch = self.batch
        found = batches.next_batch()
        self.batch += 1
        if self.batch == batches.batches_per_epoch:
            self.segment, self.batch = self.segment + 1, 0
        elif batches.is_in_last_window:
            self._open_ahead(self.segment + 1)
        return found

    def state_dict(self) -> dict[str, object]:
        """Returns the position and what it depends on, as JSON values; the same on every rank."""
        return {"segment": self.segment, "batch": self.batch, **self._identity}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to the position of a source over the same ring, seed and global batch size, on any number of ranks.

        Raises:
            StoreError: the state is of a source with other data or settings; the first differing one is named.
        """
        self.segment, self.batch = self.read_position(state)

    def read_position(self, state: dict[str, object]) -> tuple[int, int]:
        """Returns segment and batch of a saved position.

        Raises:
            StoreError: see `load_state_dict`.
        """
        return read_position(state, self._identity, what="ring", part="segment")

    def close(self) -> None:
        """Ends the threads; `next_batch` must not be called again."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._leave()
        self._forget_following()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _identity(self) -> dict[str, object]:
        return {
            "order": ORDER_VERSION,
            "seed": self._seed,
            "global_batch_size": self.global_batch_size,
            "ring": self.ring.identity,
            "memory_tokens": self._memory_tokens,
        }

    def _segment_batches(self, number: int) -> ShuffledBatches | None:
        """Returns the batches of a segment once it is whole; None where it holds less than one."""
        if self._opened is None or self._opened.number != number:
            self._leave()
            self._await(number)
            self._open_ahead(number)
            assert self._following is not None, "the segment is there"
            self._opened, self._following = self._following[1].result(), None
            self._tell(self._opened)
        return self._opened.batches

    def _leave(self) -> None:
        """Closes the segment that was read."""
        if self._opened is not None and self._opened.batches is not None:
            self._opened.batches.close()
        self._opened = None

    def _forget_following(self) -> None:
        """Closes what was opened ahead."""
        following, self._following = self._following, None
        if following is None or following[1].cancelled() or following[1].exception() is not None:
            return
        if (batches := following[1].result().batches) is not None:
            batches.close()

    def _tell(self, opened: _Opened) -> None:
        if opened.batches is not None and not self._has_told:
            self._has_told = True
            self._say(str(measure_mixing(opened.batches, num_batches=4)))
        if opened.entry.begin.passes > self._passes:
            self._passes = opened.entry.begin.passes
            self._say(
                f"ring: segment {opened.number} begins with the first document again: the text is gone through once more, and its"
                " activations are made anew"
            )

    def _await(self, number: int) -> None:
        if not self._is_started:
            self._is_started = True
            self._fillers.start(
                FillerJob(
                    kept=str(self.ring.kept),
                    folder=str(self.ring.folder),
                    ring=self.ring.config,
                    split=self.ring.split,
                    identity=self.ring.identity,
                    batch_size=self.global_batch_size,
                    num_tokens=self._num_tokens,
                    start=number,
                )
            )
        while not self.ring.record_path(number).exists():
            self._fillers.check()
            time.sleep(POLL_SECONDS)

    def _open_ahead(self, number: int) -> None:
        """Has the first batch of the next segment read where that is whole already."""
        if self._following is not None and self._following[0] != number:
            self._forget_following()
        if self._following is None and self.ring.record_path(number).exists():
            self._following = number, self._pool.submit(self._open, number)

    def _open(self, number: int) -> _Opened:
        view, entry = open_segment(self.ring, number, self._parts)
        if view.num_tokens < self.global_batch_size:
            return _Opened(number, None, entry)
        batches = ShuffledBatches(
            view,
            batch_size=self._batch_size,
            seed=int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0]),
            rank=self._rank,
            world_size=self._world_size,
            memory_bytes=self._memory_tokens * view.store.token_bytes,
            device=self._device,
            num_epochs=1,
        )
        batches.read_ahead()
        return _Opened(number, batches, entry)
