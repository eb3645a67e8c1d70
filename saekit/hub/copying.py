"""Stored weights -> float32 in memory of their own, in the order in which they are used, a few megabytes at a time."""

import torch
from torch import Tensor

__all__ = ["float32_copy"]

_BLOCK_ELEMENTS = 2**21


def float32_copy(stored: Tensor) -> tuple[Tensor, bool]:
    """Returns a float32 copy, and whether all of it is finite.

    A matrix is laid out with its longer axis first, as the kernels read both encoder and decoder: whichever way a release
    turns them, building a dictionary copies nothing again. Beside the copy only a block is in memory, so that a file that is
    mapped costs its own pages and nothing more.

    Args:
        stored: any floating dtype and shape, usually a view into a mapped file.
    """
    if stored.ndim == 0 or stored.is_meta:
        copy = stored.to(torch.float32, copy=True)
        return copy, stored.is_meta or bool(torch.isfinite(copy))
    is_wide = stored.ndim == 2 and stored.shape[0] < stored.shape[1]
    copy = torch.empty(stored.shape[::-1] if is_wide else stored.shape)
    is_finite = True
    rows = max(1, _BLOCK_ELEMENTS * len(stored) // max(stored.numel(), 1))
    for start in range(0, len(stored), rows):
        block = stored[start : start + rows].to(torch.float32)
        if block.numel():
            low, high = block.aminmax()
            is_finite = is_finite and bool(torch.isfinite(low) & torch.isfinite(high))
        if is_wide:
            # A block turned first and then copied in runs of its width is twice as fast as element by element.
            copy[:, start : start + rows] = block.T.contiguous()
        else:
            copy[start : start + rows] = block
    return copy.T if is_wide else copy, is_finite
