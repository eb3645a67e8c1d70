"""The tensors of a training's state as named arrays, of which every process holds and writes some rows.

Rows are features wherever there are features: the memory of W_enc, too, is [d_sae, d_in]. So an array means the same however many
processes wrote it, and any number of them can read it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "restore_tensors", "stage_tensors"]

NAME_KEY = "array"
TRANSPOSED_KEY = "is_transposed"


class Rows(NamedTuple):
    """Some rows of an array, in order."""

    tensor: Tensor
    """[n, ...], contiguous."""
    start: int
    """Place of its first row in the array."""
    num_rows: int
    """Of the whole array."""
    is_transposed: bool = False
    """Whether the state has the array's transpose."""


def stage_tensors(state: Mapping[str, object], *, rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Copies into the host's memory what this process is to write of a state, and waits for the copies alone.

    A tensor stands for one that every process holds: each writes an equal part of its rows. `Rows` stand for an array that
    processes hold parts of: each writes its own.

    Args:
        state: nested dicts and lists of tensors, `Rows` and plain values.
        rank: of this process.
        world_size: number of processes.

    Returns:
        The state with names in place of arrays, and this process's rows of them; tensors without rows stay where they are.
    """
    rows: dict[str, Rows] = {}

    def take(name: str, value: Tensor | Rows) -> object:
        if isinstance(value, Tensor):
            if value.ndim == 0 or value.numel() == 0:
                return value.detach().to("cpu", copy=True)
            is_transposed = value.ndim == 2 and not value.is_contiguous()
            memory = value.detach().T if is_transposed else value.detach()
            start, stop = (number * len(memory) // world_size for number in (rank, rank + 1))
            rows[name] = Rows(_copied(memory[start:stop]), start, len(memory))
        else:
            is_transposed = value.is_transposed
            rows[name] = value._replace(tensor=_copied(value.tensor.detach()))
        return {NAME_KEY: name, TRANSPOSED_KEY: is_transposed}

    named = _mapped(dict(state), take, "")
    if any(isinstance(value, Tensor) and value.is_cuda for value in _leaves(state)):
        torch.cuda.current_stream().synchronize()
    return named, rows


def restore_tensors(named: dict[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the state that `stage_tensors` took apart.

    Args:
        named: the state with names in place of arrays.
        arrays: the whole arrays.
    """
    restored = _replaced(named, arrays)
    assert isinstance(restored, dict)
    return restored


def _copied(rows: Tensor) -> Tensor:
    """Returns a copy in the host's memory; one of a GPU's rows is under way when this returns."""
    copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
    return copy.copy_(rows, non_blocking=True)


def _mapped(value: Any, take: Callable[[str, Tensor | Rows], object], name: str) -> Any:
    if isinstance(value, Tensor | Rows):
        return take(name, value)
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        return {key: _mapped(part, take, f"{prefix}{key}") for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, take, f"{prefix}{number}") for number, part in enumerate(value)]
    return value


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Rows):
        return [value.tensor]
    if isinstance(value, Mapping | list):
        parts = value.values() if isinstance(value, Mapping) else value
        return [leaf for part in parts for leaf in _leaves(part)]
    return [value]


def _replaced(value: Any, arrays: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {NAME_KEY, TRANSPOSED_KEY}:
            array = arrays[value[NAME_KEY]]
            return array.T if value[TRANSPOSED_KEY] else array
        return {key: _replaced(part, arrays) for key, part in value.items()}
    return [_replaced(part, arrays) for part in value] if isinstance(value, list) else value
