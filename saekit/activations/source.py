"""What a trainer reads from: batches of activations with an exact position, whoever makes them."""

from typing import Protocol

from torch import Tensor

__all__ = ["ActivationSource"]


class ActivationSource(Protocol):
    """An endless, resumable stream of activation batches."""

    @property
    def d_in(self) -> int:
        """Width of an activation."""

    def next_batch(self) -> Tensor:
        """Returns the next `[N, d_in]` float32 batch of this rank, on the CPU."""

    def state_dict(self) -> dict[str, object]:
        """Returns the position: JSON values that `load_state_dict` of an equally made source takes."""

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to a position, so that `next_batch` returns exactly what it would have returned there.

        Raises:
            StoreError: the state is of a source with other data or other settings.
        """
