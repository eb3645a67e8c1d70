"""A run's state by features: cut for the processes that hold some of them, and put together again from any cut."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.training.features import PER_FEATURE, by_feature
from saekit.training.layout import Layout
from saekit.training.state import load_checkpoint

__all__ = ["joined_states", "load_run", "part_name", "sliced_state"]


def part_name(layout: Layout) -> str | None:
    """Returns the name of the checkpoint's file with this process's features; None where another process writes the same ones."""
    if layout.data.rank:
        return None
    return f"features_{layout.latents.rank:04d}" if layout.is_sharded else "run"


def load_run(checkpoint: Path, layout: Layout, d_sae: int) -> dict[str, Any]:
    """Returns the file of the main process with the run's state of this process's features, however they were cut before.

    Raises:
        FormatError: a file is missing or broken.
    """
    names = sorted(path.stem for path in checkpoint.glob("features_*.pt")) or ["run"]
    if layout.is_sharded and len(names) == layout.latents.size:
        # The same cut as before: the others' parts need not be read.
        return load_checkpoint(checkpoint, names[0]) | {
            "run": load_checkpoint(checkpoint, names[layout.latents.rank])["run"]
        }
    parts = [load_checkpoint(checkpoint, name) for name in names]
    run = parts[0]["run"] if len(parts) == 1 else joined_states([part["run"] for part in parts])
    return parts[0] | {"run": sliced_state(run, layout.features(d_sae)) if layout.is_sharded else run}


def sliced_state(state: Mapping[str, Any], features: slice) -> dict[str, Any]:
    """Returns the part of a whole run's state, as `TrainRun.state_dict` gives it, that belongs to some features."""
    return _mapped([state], lambda rows: rows[0][features])


def joined_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the whole run's state of the states of those that hold its features, in order."""
    return _mapped(states, lambda rows: torch.cat(list(rows)))


def _mapped(states: Sequence[Mapping[str, Any]], join: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, Any]:
    """Returns the first state with everything that has rows by feature made of the rows of all."""
    first = states[0]
    # Thresholds are by feature where they are trained; BatchTopK has one for all.
    names = PER_FEATURE | ({"threshold"} if "log_threshold" in first["objective"] else set())

    def mapped(name: str, values: Sequence[Any]) -> Any:
        if name not in names or not isinstance(values[0], Tensor) or not values[0].ndim:
            return values[0]
        return by_feature(name, join([by_feature(name, value) for value in values]))

    optimizers = [state["optimizer"] for state in states]
    moments = {
        index: {
            key: mapped(group["name"], [each["state"][index][key] for each in optimizers])
            for key in optimizers[0]["state"][index]
        }
        for group in optimizers[0]["param_groups"]
        for index in group["params"]
        if index in optimizers[0]["state"]
    }
    averages = [state["average"] for state in states]
    return {
        **first,
        "objective": {
            key: mapped(key.rpartition(".")[2], [state["objective"][key] for state in states])
            for key in first["objective"]
        },
        "optimizer": optimizers[0] | {"state": moments},
        "silent_tokens": join([state["silent_tokens"] for state in states]),
        "average": averages[0]
        | {"ema": {name: mapped(name, [each["ema"][name] for each in averages]) for name in averages[0]["ema"]}},
    }
