"""Trainings on a ring: they take its batches in step, and let go of each segment once all have a checkpoint beyond it."""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from saekit.activations.fillers import Fillers, RingKeeper, Watcher
from saekit.activations.ringbatches import RingBatches, RingView
from saekit.activations.shuffle import ShuffledBatches
from saekit.activations.source import ActivationSource, PassingSource
from saekit.errors import ConfigError
from saekit.progress import NO_PROGRESS, Progress
from saekit.training.config import TrainConfig
from saekit.training.layout import Layout

__all__ = ["RingTap", "SharedRing", "check_ring", "open_ring"]


def check_ring(configs: Mapping[str, TrainConfig]) -> None:
    """Checks that trainings can take the batches of one ring, which is read once for all of them.

    Args:
        configs: name for messages -> its training.

    Raises:
        ConfigError: one trains through the model or on a process of its own, or they take batches of another size or order.
    """
    first = next(iter(configs))
    for name, config in configs.items():
        if config.objective is not None:
            raise ConfigError(
                f"{name}: objective {config.objective.kind!r} reads whole rows again, needs a cache, no ring"
            )
        if config.layout == "layers":
            raise ConfigError(
                f"{name}: layout 'layers' on a ring, needs 'data', 'latents' or a mesh: it is read in step"
            )
        for key in ("batch_size", "seed", "layout"):
            found, needed = getattr(config, key), getattr(configs[first], key)
            if found != needed:
                raise ConfigError(
                    f"{name}: {key} {found!r}, needs that of {first}, {needed!r}: a ring is read once for all SAEs"
                )


class _Newest(NamedTuple):
    """The batch that was read last."""

    at: tuple[int, int]
    """Its position, as it was asked for."""
    batch: Tensor
    """[N, sum of the widths]."""
    following: tuple[int, int]
    """Position of the batch after it."""


class SharedRing:
    """Batches of a ring that several trainings take in step."""

    def __init__(
        self, batches: RingBatches, fillers: Fillers, hook_points: Sequence[str], widths: Sequence[int]
    ) -> None:
        """Takes a source that nobody else reads from.

        Args:
            batches: of the ring.
            fillers: who are told which segments may go.
            hook_points: side by side in the batches.
            widths: of their activations.
        """
        self.batches = batches
        self._fillers = fillers
        ends = itertools.accumulate(widths)
        self._columns = {
            name: slice(end - width, end) for name, end, width in zip(hook_points, ends, widths, strict=True)
        }
        self._newest: _Newest | None = None
        # Training -> segment of its newest whole checkpoint.
        self._saved: dict[RingTap, int] = {}
        self._released = 0
        self._empty: set[int] = set()
        batches.when_empty = self._pass_over
        self._lock = threading.Lock()

    def tap(self, view: RingView, config: TrainConfig, layout: Layout) -> "RingTap":
        """Returns the batches of a training, which keeps every segment on disk that it may go on from."""
        tap = RingTap(self, view, [self._columns[part.hook_point] for part in view.store.parts], config, layout)
        self._saved[tap] = 0
        return tap

    def at(self, segment: int, batch: int) -> tuple[Tensor, tuple[int, int]]:
        """Returns the batch at a position, not to be changed in place, and the position after it."""
        if self._newest is None or self._newest.at != (segment, batch):
            self.batches.segment, self.batches.batch = segment, batch
            found = self.batches.next_batch()
            self._newest = _Newest((segment, batch), found, (self.batches.segment, self.batches.batch))
        return self._newest.batch, self._newest.following

    def saved(self, tap: "RingTap", segment: int) -> None:
        """Takes note that a training would go on in `segment`; may be called from any thread."""
        with self._lock:
            if tap in self._saved:
                self._saved[tap] = segment
                self._release()

    def leave(self, tap: "RingTap") -> None:
        """Takes note that a training needs nothing any more."""
        with self._lock:
            self._saved.pop(tap, None)
            self._release()

    def _pass_over(self, segment: int) -> None:
        with self._lock:
            self._empty.add(segment)
            self._release()

    def _release(self) -> None:
        needed = min(self._saved.values(), default=0)
        # Nobody goes on in a segment that holds no batch, and what follows may need its place.
        while needed in self._empty:
            needed += 1
        if needed > self._released:
            self._released = needed
            self._fillers.release(needed)


class RingTap(PassingSource):
    """One training's batches of a ring."""

    def __init__(
        self, shared: SharedRing, view: RingView, columns: list[slice], config: TrainConfig, layout: Layout
    ) -> None:
        """Begins at the first batch.

        Args:
            shared: what all of them read.
            view: what this one trains on.
            columns: of the shared batches, in order.
            config: of the training.
            layout: who trains with this process.
        """
        self._shared = shared
        self._view = view
        self._columns = columns
        self._config = config
        self._layout = layout
        self._segment, self._batch = 0, 0
        self._asked = 0

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self._view.d_in

    def next_batch(self) -> Tensor:
        """Returns the next `[N, d_in]` float32 batch of this rank."""
        whole, (self._segment, self._batch) = self._shared.at(self._segment, self._batch)
        if len(self._columns) == 1 and self.d_in == whole.shape[1]:
            return whole
        return torch.cat([whole[:, columns] for columns in self._columns], dim=1)

    def state_dict(self) -> dict[str, object]:
        """Returns the position."""
        return self._shared.batches.state_dict() | {"segment": self._segment, "batch": self._batch}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to a position, that of the newest checkpoint.

        Raises:
            StoreError: the state is of a source with other data or settings.
        """
        self._segment, self._batch = self._shared.batches.read_position(state)
        self._asked = self._segment
        self._shared.saved(self, self._segment)

    @contextlib.contextmanager
    def sample(self) -> Iterator[ActivationSource]:
        """Yields the training tokens of the cache that stays, from their first batch on."""
        rank, world_size = self._layout.data.rank, self._layout.data.size
        with ShuffledBatches(
            self._view,
            batch_size=self._config.batch_size // world_size,
            seed=self._config.seed,
            rank=rank,
            world_size=world_size,
            device=self._layout.device,
        ) as batches:
            yield batches

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a segment was ended since the last checkpoint was begun."""
        return self._segment > self._asked

    def is_being_saved(self, written: "Future[None]") -> None:
        """Takes the promise of a checkpoint with the present position."""
        segment = self._asked = self._segment

        def note(done: "Future[None]") -> None:
            if done.exception() is None:
                self._shared.saved(self, segment)

        written.add_done_callback(note)

    def leave(self) -> None:
        """Lets go of all segments: the training is finished, or will not go on in this process."""
        self._shared.leave(self)


def open_ring(
    views: Sequence[RingView],
    configs: Sequence[TrainConfig],
    layout: Layout,
    stack: contextlib.ExitStack,
    progress: Progress = NO_PROGRESS,
) -> SharedRing:
    """Returns what trainings of one ring share; the ring is filled from the first batch that they take until `stack` ends.

    Args:
        views: of the same ring, at any of its hook points.
        configs: of the trainings, which `check_ring` has passed.
        layout: who trains with this process.
        stack: keeps the ring open.
        progress: is told how well batches mix.

    Raises:
        ConfigError: the folder holds another ring, or the batch cannot be shared evenly by the processes.
        ResourceError: another training uses the ring.
    """
    config, ring = configs[0], views[0].ring
    share, rest = divmod(config.batch_size, layout.data.size)
    if rest:
        raise ConfigError(f"training: batch_size {config.batch_size}, needs a multiple of {layout.data.size} processes")
    fillers: Fillers
    if layout.is_main_process:
        fillers = keeper = RingKeeper(ring)
        stack.callback(keeper.close)
    layout.wait_for_everyone()
    if not layout.is_main_process:
        fillers = Watcher(ring)
    found = {part.hook_point: part for view in views for part in view.store.parts}
    parts = [found[name] for name in ring.cache.hook_points if name in found]
    batches = stack.enter_context(
        RingBatches(
            ring,
            parts,
            fillers,
            batch_size=share,
            num_tokens=max(each.num_steps * each.batch_size for each in configs),
            seed=config.seed,
            rank=layout.data.rank,
            world_size=layout.data.size,
            device=layout.device,
            say=progress.say if layout.is_main_process else lambda _: None,
        )
    )
    return SharedRing(batches, fillers, [part.hook_point for part in parts], [part.d_in for part in parts])
