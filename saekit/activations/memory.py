"""Memory that is used again: the system clears what it gives out anew, which takes as long as filling it."""

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

from saekit.activations.codec import AnyArray

__all__ = ["TensorMemory", "aligned"]


class TensorMemory:
    """Gives out float32 tensors, in the memory of those that nobody holds any more; their contents are arbitrary.

    Tensors may be taken by one thread and dropped by any.
    """

    def __init__(self, rows: int, width: int) -> None:
        """Takes no memory yet."""
        self._shape = rows, width
        self._free: list[AnyArray] = []

    def take(self) -> Tensor:
        """Returns a tensor `[rows, width]`."""
        memory = self._free.pop() if self._free else aligned(*self._shape, np.dtype(np.float32))
        # torch holds this array until the last tensor over its memory is gone, those that share it included.
        held = memory[:]
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.from_numpy(held)


def aligned(rows: int, width: int, dtype: np.dtype[np.generic]) -> AnyArray:
    """Returns an array that begins where a page does: the system copies into it several times as fast on some processors."""
    size = rows * width * dtype.itemsize
    memory = np.empty(size + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + size].view(dtype).reshape(rows, width)
