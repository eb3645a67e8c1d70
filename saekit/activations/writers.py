"""Several processes that write one cache together, started by torchrun or `accelerate launch`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from saekit.errors import ResourceError, SaekitError

__all__ = ["ALONE", "Writers", "join_writers"]

# A process may wait for another one's shards as long as those take; one that ends is noticed at once.
_PATIENCE = timedelta(days=30)

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Writers:
    """This process among those that write a cache."""

    rank: int = 0
    """From 0."""
    world_size: int = 1
    """How many there are."""
    group: dist.ProcessGroup | None = None
    """What they talk over; None for one alone."""

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def gather(self, value: _Value) -> list[_Value]:
        """Returns the value of every process, by rank.

        Raises:
            ResourceError: another process has ended.
        """
        if self.world_size == 1:
            return [value]
        values: list[_Value | None] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise ResourceError(
                "cache: another of its processes has ended, needs all of them; what is finished stays: run the same command"
                " again to go on"
            ) from error
        return values  # type: ignore[return-value]  # all of them are filled

    def check(self, error: SaekitError | None) -> None:
        """Waits for all processes and raises what one of them failed with, on each.

        Raises:
            SaekitError: this process's own error, or the first one's that has any.
        """
        errors = self.gather(error)
        found = error if error is not None else next((other for other in errors if other is not None), None)
        if found is not None:
            raise found

    def first(self, function: Callable[[], _Value]) -> _Value:
        """Returns what the first process gets from `function`, on every process.

        Raises:
            SaekitError: as `function` does on the first process.
        """
        value: _Value | None = None
        error: SaekitError | None = None
        if self.is_first:
            try:
                value = function()
            except SaekitError as found:
                error = found
        self.check(error)
        return self.gather(value)[0]  # type: ignore[return-value]  # the first one has it

    def share(self, work: Sequence[_Value]) -> Sequence[_Value]:
        """Returns this process's part of a list that all of them have."""
        return work[self.rank :: self.world_size]


ALONE = Writers()


def join_writers() -> Writers:
    """Returns this process among those of its launcher, `ALONE` where there is none."""
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return ALONE
        dist.init_process_group("gloo", timeout=_PATIENCE)
    if dist.get_world_size() == 1:
        return ALONE
    # A group of one's own: what is sent lies on the host, and nobody else's patience holds.
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Writers(rank=dist.get_rank(), world_size=dist.get_world_size(), group=group)
