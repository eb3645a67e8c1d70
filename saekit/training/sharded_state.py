"""A run's state by features: what a process that holds some of them writes of it, and what it takes of the whole."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from saekit.training.arrays import Rows
from saekit.training.features import PER_FEATURE, by_feature
from saekit.training.layout import Layout

__all__ = ["sliced_state", "written_state"]


def written_state(state: Mapping[str, Any], layout: Layout, d_sae: int) -> dict[str, Any]:
    """Returns a run's state, as `TrainRun.state_dict` gives it, with `Rows` of the whole for what this process has by feature.

    Processes that hold the same features write disjoint parts of them.

    Args:
        state: of this process's features.
        layout: which ones these are.
        d_sae: of the whole SAE.
    """
    if not layout.is_sharded:
        return dict(state)
    first, data = layout.features(d_sae).start, layout.data

    def rows(name: str, value: Tensor) -> Rows:
        own = by_feature(name, value)
        start, stop = (number * len(own) // data.size for number in (data.rank, data.rank + 1))
        return Rows(own[start:stop], first + start, d_sae, is_transposed=own is not value)

    return _mapped(state, rows)


def sliced_state(state: Mapping[str, Any], features: slice) -> dict[str, Any]:
    """Returns the part of a whole run's state, as `TrainRun.state_dict` gives it, that belongs to some features."""

    def cut(name: str, value: Tensor) -> Tensor:
        # A copy: a view would keep the whole in memory.
        return by_feature(name, by_feature(name, value)[features].clone())

    return _mapped(state, cut)


def _mapped(state: Mapping[str, Any], change: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """Returns the state with everything changed that has rows by feature; `change` takes a parameter's name and the value."""
    # Thresholds are by feature where they are trained; BatchTopK has one for all.
    names = PER_FEATURE | ({"threshold"} if "log_threshold" in state["objective"] else set())

    def mapped(name: str, value: Any) -> Any:
        return change(name, value) if name in names and isinstance(value, Tensor) and value.ndim else value

    optimizer, average = state["optimizer"], state["average"]
    moments = {
        index: {key: mapped(group["name"], value) for key, value in optimizer["state"][index].items()}
        for group in optimizer["param_groups"]
        for index in group["params"]
        if index in optimizer["state"]
    }
    return {
        **state,
        "objective": {key: mapped(key.rpartition(".")[2], value) for key, value in state["objective"].items()},
        "optimizer": optimizer | {"state": moments},
        "silent_tokens": change("silent_tokens", state["silent_tokens"]),
        "average": average | {"ema": {name: mapped(name, value) for name, value in average["ema"].items()}},
    }
