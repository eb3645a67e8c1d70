"""What a trainer reads from: batches of activations with an exact position, whoever makes them."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from saekit.errors import StoreError

__all__ = ["ActivationSource", "read_position"]


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


def read_position(state: Mapping[str, object], identity: Mapping[str, object]) -> tuple[int, int]:
    """Returns epoch and batch of a saved position.

    Args:
        state: what was saved.
        identity: what a position of this source depends on.

    Raises:
        StoreError: the state is of a source with other data or settings; the first differing one is named.
    """
    for key, value in identity.items():
        if state.get(key) != value:
            raise StoreError(f"batches: saved with {key} {state.get(key)!r}, needs {value!r} to go on exactly there")
    epoch, batch = state["epoch"], state["batch"]
    assert isinstance(epoch, int)
    assert isinstance(batch, int)
    return epoch, batch
