"""What the processes of one training need of each other beside sums: a writer of checkpoints, and word of who was lost."""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from saekit.errors import ResourceError
from saekit.training.background import CheckpointWriter
from saekit.training.layout import Layout

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["checkpoint_writer", "make_accelerator", "watching"]

PATIENCE = timedelta(minutes=10)
"""How long a process waits for another in a collective before it takes it for lost."""
ANSWER_SECONDS = 3.0
"""How long those that are left wait for each other's word; all of them notice a lost connection at once."""


def make_accelerator() -> "Accelerator":
    """Returns the process's part in the training; off CUDA everything runs on the CPU: other accelerators lack float64."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def checkpoint_writer(layout: Layout) -> CheckpointWriter:
    """Returns a writer of checkpoints that all processes of a training write together."""
    return CheckpointWriter(rank=layout.process_index, world_size=layout.num_processes)


@contextlib.contextmanager
def watching(layout: Layout, *folders: Path) -> Iterator[None]:
    """Inside the block, a process that was lost ends the others with one line that names it.

    Args:
        layout: who trains with this process.
        folders: of the SAEs, where their checkpoints are.

    Raises:
        ResourceError: another process was lost.
    """
    rank, world_size = layout.process_index, layout.num_processes
    try:
        yield
    except Exception as error:
        if world_size == 1:
            raise
        reason = (str(error).splitlines() or [""])[0]
        if not _is_lost_connection(error):
            _tell(rank, world_size, f"failed: {type(error).__name__}: {reason}", wait=False)
            raise
        lost = _tell(rank, world_size, "", wait=True)
        named = ", ".join(f"process {number} {how}" for number, how in lost.items()) or "another process"
        how = "timed out" if "imed out" in reason else "connection closed"
        shown = ", ".join(repr(str(folder)) for folder in folders[:3]) + (", ..." if len(folders) > 3 else "")
        raise ResourceError(
            f"training: process {rank} of {world_size} lost {named} ({how}); checkpoints in {shown} are kept: run the same"
            " command again to go on"
        ) from error


def _is_lost_connection(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(name in str(error) for name in ("gloo", "NCCL", "Gloo"))


def _tell(rank: int, world_size: int, word: str, *, wait: bool) -> dict[int, str]:
    """Leaves word of this process where the launcher's processes first met, and returns what became of the others.

    Returns:
        Rank -> how it ended, of those that left no word or that of a failure; {} where nobody can be asked.
    """
    place = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"saekit/{place}/{number}" for number in range(world_size)]
    lost: dict[int, str] = {}
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, though its module does not say so
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=ANSWER_SECONDS),
        )
        store.set(keys[rank], word or "lost another")
        if not wait:
            return {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline and not store.check(keys):
            time.sleep(0.1)
        for number, key in enumerate(keys):
            said = store.get(key).decode() if store.check([key]) else "was killed, or does not answer"
            if said != "lost another":
                lost[number] = said
    except (KeyError, ValueError, RuntimeError):
        # The first process held the meeting place, and is the one that is gone.
        return {0: "was killed, or does not answer"} if rank and wait and not lost else lost
    return lost
