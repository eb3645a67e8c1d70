"""Checkpoints written beside the training: the steps wait for a copy in memory, a thread does the rest."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from saekit.training.arrays import Rows, stage_tensors
from saekit.training.layout import side_group
from saekit.training.state import (
    RUN_NAME,
    cannot_write,
    process_name,
    publish_checkpoint,
    staging_folder,
    write_part,
)
from saekit.training.storage import RowsPlanner, finish_arrays, write_rows

__all__ = ["CheckpointWriter"]

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process's writing may take longer than that of the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    """What a process writes of one checkpoint."""

    out: Path
    step: int
    files: Mapping[str, Mapping[str, object]]
    """Name of a file -> what is in it."""
    arrays: Mapping[str, Rows]


class _CannotWriteError(Exception):
    """Some process could not write; the first one's reason."""


class CheckpointWriter:
    """Writes the checkpoints of a process's trainings in the order they are handed over, one at a time.

    A thread, and not a process: it dies with the training, so that nothing is renamed after a kill, when the same run may have
    been started again. Processes meet in a group of their own, as the training goes on in its own at the same time.
    """

    def __init__(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Takes this process's place among those that write one checkpoint."""
        self._rank, self._world_size = rank, world_size
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            # Before the first step: who waits here for one that was killed sees no connection close.
            world = dist.group.WORLD
            assert world is not None
            self._group = side_group(world, "checkpoints", PATIENCE)
        # New memory takes several times as long as the copy itself: the system hands it out page by page, and zeroes it.
        self._buffers: dict[Path, dict[str, Tensor]] = {}
        self._last: dict[Path, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saekit-checkpoint")

    def write(
        self,
        out: Path,
        step: int,
        *,
        state: Mapping[str, object],
        shared: Mapping[str, object],
        own: Mapping[str, object],
    ) -> Future[None]:
        """Copies what this process writes, and begins to write; all processes call this for the same steps.

        The checkpoint before of the same folder is to be done: its memory is used again, and is held until the writer ends.

        Args:
            out: folder of the SAE.
            step: of the training.
            state: the run's, the same on every process but for `Rows`.
            shared: values that the first process writes beside it.
            own: what this process needs of its own.

        Returns:
            Done when the checkpoint of all processes is in place; it holds a `ResourceError` where it is not.
        """
        assert out not in self._last or self._last[out].done(), "the last checkpoint of this folder is not written yet"
        named, arrays = stage_tensors(
            state, rank=self._rank, world_size=self._world_size, buffers=self._buffers.setdefault(out, {})
        )
        files: dict[str, Mapping[str, object]] = {process_name(self._rank): dict(own)}
        if self._rank == 0:
            files[RUN_NAME] = {"run": named, **shared}
        written = self._thread.submit(self._write, _Snapshot(out=out, step=step, files=files, arrays=arrays))
        self._last[out] = written
        return written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written."""
        self._thread.shutdown(wait=True)
        self._buffers.clear()

    def _write(self, snapshot: _Snapshot) -> None:
        folder = staging_folder(snapshot.out, snapshot.step)
        planner = RowsPlanner(snapshot.arrays)
        try:
            plans: list[SavePlan] = self._all(planner.create_local_plan)
            results = self._all(lambda: self._write_files(folder, snapshot, planner, plans))
            self._all(lambda: self._commit(snapshot, planner, plans, results))
        except _CannotWriteError as error:
            if self._rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise cannot_write(snapshot.out, snapshot.step, str(error)) from error

    def _write_files(
        self, folder: Path, snapshot: _Snapshot, planner: RowsPlanner, plans: Sequence[SavePlan]
    ) -> list[WriteResult]:
        for name, content in snapshot.files.items():
            write_part(folder, name, content)
        return write_rows(folder, planner, plans, self._rank)

    def _commit(
        self,
        snapshot: _Snapshot,
        planner: RowsPlanner,
        plans: Sequence[SavePlan],
        results: Sequence[list[WriteResult]],
    ) -> None:
        if self._rank == 0:
            finish_arrays(staging_folder(snapshot.out, snapshot.step), planner, plans, results)
            publish_checkpoint(snapshot.out, snapshot.step)

    def _all(self, work: Callable[[], T]) -> list[T]:
        """Returns what the work gave on every process, in the order of ranks, once all have done it.

        Raises:
            _CannotWriteError: on every process, where it failed on one.
        """
        given: T | None = None
        reason: str | None = None
        try:
            given = work()
        except (OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        found: list[tuple[T | None, str | None]] = [(given, reason)] * self._world_size
        if self._group is not None:
            dist.all_gather_object(found, (given, reason), group=self._group)
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                of = f" (process {rank})" if self._world_size > 1 else ""
                raise _CannotWriteError(f"{failure}{of}")
        return [value for value, _ in found]  # type: ignore[misc]  # no reason, so the work's value
