"""The processes that fill a ring, started by a training, which they do not outlive.

The training writes a `FillerJob` to their standard input, and to the first one's then a number a line: segments below it may go. The
end of that input is the end of the process, whatever it is doing: what it has not declared whole is made anew.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Never

from saekit.activations.ring import SEGMENTS_HELD, HeldOut, Ring, RingConfig, plan_ring
from saekit.activations.segment import make_segment, read_ledger
from saekit.activations.store import ActivationStore
from saekit.activations.walk import TextWalk
from saekit.activations.writers import Writers, join_writers
from saekit.config import Config
from saekit.errors import DataError, ResourceError, SaekitError
from saekit.manifest import locked
from saekit.models.load import LanguageModel, load_model

__all__ = ["FillerJob", "Orders", "fill", "main", "remove_segments"]

FILLING_NAME = "filling"
"""Folder whose lock says that a ring is being filled."""
LOCK_PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.05


class FillerJob(Config):
    """What to fill."""

    kept: str
    """Folder of the cache."""
    folder: str
    """Of the ring."""
    ring: RingConfig
    """The budget."""
    split: HeldOut
    """Whose test documents are left out."""
    identity: str
    """Of the ring."""
    batch_size: int
    """Tokens of a global batch: what is left of a segment is not trained on."""
    num_tokens: int
    """That the training takes from segment 0 on; no segment is made beyond them."""
    start: int
    """Segment that the training begins or goes on with."""


class Orders:
    """What the training has said so far."""

    def __init__(self, job: FillerJob) -> None:
        """Takes what was said first."""
        self.job = job
        self._released = job.start

    def release(self, number: int) -> None:
        """Takes note that segments below a number may go."""
        self._released = max(self._released, number)

    def listen(self, lines: Iterable[str]) -> Never:
        """Takes a number a line until there are no more, and ends the process."""
        for line in lines:
            self.release(int(line))
        # The training has ended. Not `sys.exit`: other threads may be anywhere, and all that counts is on disk.
        os._exit(0)

    def wait_for_room(self, ring: Ring, number: int) -> None:
        """Removes what is released, and returns once there is room for a segment."""
        while True:
            released = self._released
            remove_segments(ring, keep=range(released, max(released, number) + 1))
            if number < released + SEGMENTS_HELD:
                return
            time.sleep(POLL_SECONDS)

    def serve(self, ring: Ring, number: int) -> Never:
        """Removes what is released until the training ends."""
        while True:
            self.wait_for_room(ring, number)
            time.sleep(POLL_SECONDS)


def main() -> None:
    """Fills a ring until the training ends."""
    # Ctrl-C is the training's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = FillerJob.model_validate_json(sys.stdin.readline())
    orders = Orders(job)
    threading.Thread(target=orders.listen, args=(sys.stdin,), daemon=True).start()
    try:
        writers = join_writers()
        ring = plan_ring(job.ring, job.kept, job.folder, split=job.split, batch_size=job.batch_size)
        assert ring.identity == job.identity, "both have planned the same ring"
        with _filling(ring) if writers.is_first else contextlib.nullcontext():
            fill(ring, orders, writers)
    except SaekitError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        # Threads of a process group may still be waiting.
        os._exit(2)


@contextlib.contextmanager
def _filling(ring: Ring) -> Iterator[None]:
    """Waits for the ring to be nobody else's: a process whose training was killed may take a moment to end."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(ring.folder / FILLING_NAME))
                break
            except ResourceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
        yield


def fill(ring: Ring, orders: Orders, writers: Writers, *, lm: LanguageModel | None = None) -> None:
    """Makes one segment after another, as far as there is room and the training needs them, then only removes them.

    Args:
        ring: whose segments.
        orders: of the training.
        writers: the processes that fill the ring.
        lm: the model, if it is loaded already.

    Raises:
        SaekitError: as `cache_activations`.
    """
    job = orders.job
    # Before a model is loaded: segments of another place, and what was being removed.
    writers.first(lambda: remove_segments(ring, keep=range(job.start, job.start + SEGMENTS_HELD)))
    stores = [ActivationStore.open(ring.kept, name) for name in ring.cache.hook_points]
    devices = ring.config.devices
    model = ring.cache.model
    if lm is None:
        lm = load_model(model.model_copy(update={"device": devices[writers.rank]}) if devices else model)
    stores[0].check_model(lm)
    thresholds = {store.hook_point: store.statistics.massive_threshold for store in stores}
    walk = TextWalk(ring.cache.text, lm.tokenizer, ring.cache.tokens, held_out=ring.held_out())
    number = job.start
    taken = sum(_taken(entry.num_tokens, job) for entry in read_ledger(ring).segments[:number])
    while taken < job.num_tokens:
        segment = number
        writers.first(lambda: orders.wait_for_room(ring, segment))  # noqa: B023  # called at once
        entry = make_segment(ring, number, lm, walk, writers, thresholds)
        taken += _taken(entry.num_tokens, job)
        if entry.begin.passes and not taken:
            raise DataError(
                f"ring: no segment of {ring.sizes.segment_tokens:,} tokens holds a batch of {job.batch_size:,} to train on, needs"
                " more text or a smaller training.batch_size"
            )
        number += 1
    writers.first(lambda: orders.serve(ring, number))


def _taken(num_tokens: int, job: FillerJob) -> int:
    return num_tokens - num_tokens % job.batch_size


def remove_segments(ring: Ring, *, keep: range) -> None:
    """Removes all segments but some, each at once for everyone who looks.

    Raises:
        ResourceError: one cannot be removed.
    """
    kept = {ring.segment_folder(number).name for number in keep}
    for folder in [*ring.folder.glob(".segment-*"), *ring.folder.glob("segment-*")]:
        if folder.name not in kept:
            hidden = folder if folder.name.startswith(".") else folder.rename(folder.with_name(f".{folder.name}"))
            shutil.rmtree(hidden)
