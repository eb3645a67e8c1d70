"""Training figures as rows of JSON: each is on disk as soon as it is written, none twice after a resume."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.errors import ResourceError

__all__ = ["METRICS_NAME", "PART_FIELDS", "SPEED_FIELDS", "MetricsLog", "RunningMeans", "read_metrics"]

METRICS_NAME = "metrics.jsonl"
PART_FIELDS = ("seconds_read", "seconds_compute", "seconds_reduce", "seconds_update")
"""A step's parts: waiting for the batch; forward and backward; sums over processes; optimizer and constraints."""
SPEED_FIELDS = (
    "tokens_per_second",
    *PART_FIELDS,
    "seconds_evaluation",
    "seconds_checkpoint",
    "stall_fraction",
    "mfu",
    "memory_peak_bytes",
)
"""Figures of the machine in a row of training figures, which differ from run to run."""


class MetricsLog:
    """An append-only `metrics.jsonl`, cut back to a checkpoint's length on resume."""

    def __init__(self, folder: Path, *, position: int = 0) -> None:
        """Opens the log and drops what lies behind `position` bytes: rows of steps that will be done again.

        Raises:
            ResourceError: the file cannot be written.
        """
        self.path = folder / METRICS_NAME
        try:
            with self.path.open("ab") as file:
                file.truncate(position)
        except OSError as error:
            raise ResourceError(f"{str(self.path)!r}: cannot be written: {error.strerror or error}") from error

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def append(self, row: Mapping[str, object]) -> None:
        """Writes one row; a figure that is not finite becomes null.

        Raises:
            ResourceError: the disk is full.
        """
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        try:
            with self.path.open("ab") as file:
                file.write((json.dumps(values, allow_nan=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"{str(self.path)!r}: cannot be written: {error.strerror or error}") from error


def read_metrics(folder: str | Path) -> list[dict[str, object]]:
    """Returns the rows of a training folder's log, [] where there is none yet; an unfinished last line is left out."""
    path = Path(folder) / METRICS_NAME
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class RunningMeans:
    """Means of figures since the last row."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Notes one step."""
        for key, value in figures.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1

    def take(self) -> dict[str, float]:
        """Returns the means and starts anew."""
        means = {key: value / self.count for key, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, object]:
        """Returns the exact state."""
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.sums, self.count = dict(state["sums"]), state["count"]
