"""Stored weights -> memory of their own, in the order in which they are used, read once."""

import torch
from torch import Tensor

__all__ = ["checked_copy"]

# A block that is converted is still in the cache when it is checked.
_BLOCK_ELEMENTS = 2**18
# A block that is turned has runs of a few hundred bytes, for rows of some ten thousand features.
_TURNED_ELEMENTS = 2**22


def checked_copy(stored: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, bool]:
    """Returns a copy in another dtype or the same, and whether all of it is finite.

    A matrix is laid out with its longer axis first, as the kernels read both encoder and decoder: whichever way a release
    turns them, building a dictionary copies nothing again. Beside the copy only a block is in memory, so that a file that is
    mapped costs its own pages and nothing more.

    Args:
        stored: any floating dtype and shape, usually a view into a mapped file.
    """
    if stored.is_meta:
        return stored.to(dtype, copy=True), True
    is_wide = stored.ndim == 2 and stored.shape[0] < stored.shape[1]
    copy = torch.empty(stored.shape[::-1] if is_wide else stored.shape, dtype=dtype)
    if is_wide:
        _turn(stored, copy)
        return copy.T, _is_finite(copy)
    if stored.ndim == 0:
        return copy.copy_(stored), _is_finite(copy)
    is_finite = True
    rows = max(1, _BLOCK_ELEMENTS * len(stored) // max(stored.numel(), 1))
    for start in range(0, len(stored), rows):
        block = copy[start : start + rows].copy_(stored[start : start + rows])
        is_finite = is_finite and _is_finite(block)
    return copy, is_finite


def _turn(stored: Tensor, copy: Tensor) -> None:
    """copy = stored.T: torch does it in tiles, but only without a conversion and from contiguous memory to contiguous memory."""
    if stored.dtype == copy.dtype:
        copy.copy_(stored.T)
        return
    num_rows, width = stored.shape
    rows = max(1, min(num_rows, _TURNED_ELEMENTS // width))
    turned = stored.new_empty(rows * width)
    for start in range(0, num_rows, rows):
        block = stored[start : start + rows]
        copy[:, start : start + rows] = turned[: block.numel()].view(width, len(block)).copy_(block.T)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
