"""Whole SAEs on different processes: who trains which, and how all learn what became of them."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from saekit.errors import ResourceError
from saekit.training.layout import Layout, side_group
from saekit.training.processes import watching

__all__ = ["each_its_own", "shares"]

T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""How long a process that is done waits for the others' SAEs; one that dies is noticed at once."""


def shares(costs: Mapping[Path, float], num_processes: int) -> list[list[Path]]:
    """Returns what each process trains, some perhaps nothing: the dearest first, each to whoever has least to do so far."""
    found: list[list[Path]] = [[] for _ in range(num_processes)]
    loads = [0.0] * num_processes
    for path in sorted(costs, key=lambda path: (-costs[path], path)):
        least = loads.index(min(loads))
        found[least].append(path)
        loads[least] += costs[path]
    return found


def each_its_own(everyone: Layout, work: Callable[[], T], folders: Sequence[Path]) -> list[T]:
    """Runs this process's own work, waits for that of the others, and returns the results of all in order.

    Args:
        everyone: all processes.
        work: of this one.
        folders: of the SAEs of all.

    Raises:
        ResourceError: another process was lost, or could not do its own; what this one did is done.
    """
    group = None if everyone.everyone.group is None else side_group(everyone.everyone.group, "layers", PATIENCE)
    error: BaseException | None = None
    result: T | None = None
    try:
        result = work()
    # Whatever it is, the others must not wait for ever; it is raised below.
    except BaseException as found:
        error = found
    told = None if error is None else (str(error).splitlines() or [""])[0] or type(error).__name__
    outcomes: list[tuple[T | None, str | None]] = [(result, told)] * everyone.num_processes
    if group is not None:
        with watching(everyone, *folders):
            dist.all_gather_object(outcomes, (result, told), group=group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise ResourceError(
                f"training: process {rank} of {everyone.num_processes} could not finish its SAEs: {message}; run the same again"
            )
    return [value for value, _ in outcomes]  # type: ignore[misc]  # none of them is missing here
