"""Numbers on their way from the device to the host."""

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A copy of a tensor in the host's memory, begun at once and waited for when it is read.

    Only what the device was given before the copy is waited for, not what it was given since.
    """

    def __init__(self, values: Tensor) -> None:
        """Begins to copy values of any shape."""
        self._values = values
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = pinned.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            self._event.record()

    def read(self) -> list[float]:
        """Returns the numbers of a vector."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
