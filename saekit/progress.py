"""How long work reports itself: library functions take a `Progress`, the command line brings one that draws bars."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

__all__ = ["NO_PROGRESS", "Progress", "Task"]


class Task(Protocol):
    """One piece of work whose size is known."""

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        """Reports `amount` more units done; `figures` are shown beside the bar, e.g. `loss=0.31`."""


class Progress(Protocol):
    """Where work is reported to."""

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> AbstractContextManager[Task]:
        """Opens a piece of work of `total` units (`unit` in the plural: "tokens"), `done` of which a former run did."""

    def say(self, message: str) -> None:
        """Tells the user one fact, e.g. how many tokens were left out and why."""


class _Silent:
    def advance(self, amount: int = 1, **figures: float | str) -> None:
        pass

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Task]:
        yield self

    def say(self, message: str) -> None:
        pass


NO_PROGRESS: Progress = _Silent()
"""The default of every library function: says nothing."""
