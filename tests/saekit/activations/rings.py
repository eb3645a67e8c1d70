"""Rings for tests: filled by a thread of the test's own process, or filled before and left alone."""

import contextlib
import os
import threading
import time
from pathlib import Path

from saekit.activations.filler import FillerJob, Orders, fill
from saekit.activations.ring import HeldOut, Ring, RingConfig, plan_ring
from saekit.activations.writers import ALONE
from saekit.errors import SaekitError
from saekit.models import LanguageModel


class StoppedError(Exception):
    """The test is over."""


class StoppableOrders(Orders):
    """Orders that can end the thread that obeys them."""

    is_stopped = False

    @property
    def _released(self) -> int:
        if self.is_stopped:
            raise StoppedError
        return self._number

    @_released.setter
    def _released(self, number: int) -> None:
        self._number = number


class ThreadFillers:
    """Fills a ring in a thread, and measures the folders all the while."""

    def __init__(self, ring: Ring, lm: LanguageModel) -> None:
        self.ring, self.lm = ring, lm
        self.most_bytes, self.most_segments = 0, 0
        self.jobs: list[FillerJob] = []
        self.orders: StoppableOrders | None = None
        self.error: SaekitError | None = None
        self.threads: list[threading.Thread] = []

    def start(self, job: FillerJob) -> None:
        self.jobs.append(job)
        self.orders = StoppableOrders(job)
        self.threads = [threading.Thread(target=self._fill), threading.Thread(target=self._measure)]
        for thread in self.threads:
            thread.start()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def release(self, number: int) -> None:
        if self.orders is not None:
            self.orders.release(number)

    def close(self) -> None:
        if self.orders is not None:
            self.orders.is_stopped = True
        for thread in self.threads:
            thread.join()

    def _fill(self) -> None:
        assert self.orders is not None
        try:
            fill(self.ring, self.orders, ALONE, lm=self.lm)
        except StoppedError:
            pass
        except SaekitError as error:
            self.error = error

    def _measure(self) -> None:
        assert self.orders is not None
        while not self.orders.is_stopped:
            self.most_bytes = max(self.most_bytes, size_of(self.ring.kept, self.ring.folder))
            self.most_segments = max(self.most_segments, len(list(self.ring.folder.glob("segment-*"))))
            time.sleep(0.01)


class NoFillers:
    """What is needed is there already."""

    def start(self, job: FillerJob) -> None:
        pass

    def check(self) -> None:
        raise AssertionError("a segment is waited for that nobody makes")

    def release(self, number: int) -> None:
        pass


def size_of(*folders: Path) -> int:
    """Returns the bytes of all files; those that go meanwhile count as gone."""
    total = 0
    for folder in folders:
        for at, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.stat(os.path.join(at, name)).st_size  # noqa: PTH116, PTH118  # thousands a second
    return total


def make_ring(
    kept: Path, folder: Path, *, shards: int = 1, batch_size: int = 32, places: tuple[tuple[str, ...], ...]
) -> Ring:
    """Returns a ring whose segments have so many shards, within a budget that holds them and no more."""
    split = HeldOut(test_fraction=0.2, seed=0, places=places)
    disk = 10**9
    while True:
        ring = plan_ring(RingConfig(disk=disk), kept, folder, split=split, batch_size=batch_size)
        found = ring.sizes.segment_rows // ring.cache.shard_rows
        if found == shards:
            return ring
        # Down to the budget of the wanted size: segments grow by whole shards.
        disk -= 2 * (found - shards) * (ring.sizes.segment_bytes // (found + 1))
