"""What the command line shows: bars on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

from saekit.progress import Progress as ProgressProtocol
from saekit.progress import Task

__all__ = ["ConsoleProgress", "make_progress"]

LINE_SECONDS = 15.0
"""Seconds between two lines of progress where there is no terminal."""


def _amount(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _figures(figures: dict[str, float | str]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class _RateColumn(ProgressColumn):
    """`1.6k tokens/s`"""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_amount(speed)} {task.fields['unit']}/s", style="cyan")


class _BarTask:
    def __init__(self, bars: Progress, task_id: TaskID) -> None:
        self._bars = bars
        self._id = task_id

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        if figures:
            self._bars.update(self._id, advance=amount, figures=_figures(figures))
        else:
            self._bars.advance(self._id, amount)


class _LineTask:
    def __init__(self, console: Console, name: str, total: int, unit: str, done: int) -> None:
        self._console, self._name, self._total, self._unit = console, name, total, unit
        self._done = self._first = done
        self._started = self._last_line = time.monotonic()
        self._figures: dict[str, float | str] = {}

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self._done += amount
        self._figures.update(figures)
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._print(now)

    def _print(self, now: float) -> None:
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        left = f", {_duration((self._total - self._done) / rate)} left" if rate > 0 and self._done < self._total else ""
        self._console.print(
            f"{self._name}: {_amount(self._done)}/{_amount(self._total)} {self._unit}, {_amount(rate)} {self._unit}/s{left}"
            f"  {_figures(self._figures)}".rstrip(),
            highlight=False,
            markup=False,
        )

    def close(self) -> None:
        self._print(time.monotonic())


class ConsoleProgress:
    """A `saekit.progress.Progress` on a rich console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Task]:
        """Draws a bar with rate and time left; on a pipe, a plain line every 15 seconds and one at the end."""
        if not self.console.is_terminal:
            line = _LineTask(self.console, name, total, unit, done)
            yield line
            line.close()
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
        )
        with Progress(*columns, console=self.console, speed_estimate_period=60.0) as bars:
            yield _BarTask(bars, bars.add_task(name, total=total, completed=done, unit=unit, figures=""))

    def say(self, message: str) -> None:
        """Prints one fact."""
        self.console.print(f"  {message}", highlight=False, markup=False, soft_wrap=True)


def make_progress() -> ConsoleProgress:
    """Returns the command line's progress, on standard error so that standard output stays for results."""
    # Names of labelers such as `llm:m:input` are no emoji codes.
    console = Console(stderr=True, emoji=False)
    progress = ConsoleProgress(console)
    _: ProgressProtocol = progress
    return progress
