"""What a step on a device would wait for, seen without a device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read a value, or a number of values, from the device.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "is_nonzero", "unique", "bincount")


class Waits(TorchDispatchMode):
    """Records the operators that would wait for a device, and the host's numbers that would be copied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        is_masked = name.startswith(("aten.index.", "aten.index_put")) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1] or ()
        )
        if is_masked or any(word in name for word in WAITING) or "lift_fresh" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
