"""What a trainer reads from: batches of activations with an exact position, whoever makes them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from saekit.errors import StoreError

__all__ = ["ActivationSource", "PassingSource", "lasting", "read_position"]


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


class PassingSource(ABC):
    """An `ActivationSource` whose activations go once a checkpoint beyond them is whole; what is measured, is on others that stay."""

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Width of an activation."""

    @abstractmethod
    def next_batch(self) -> Tensor:
        """Returns the next `[N, d_in]` float32 batch of this rank."""

    @abstractmethod
    def state_dict(self) -> dict[str, object]:
        """Returns the position."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to a position."""

    @abstractmethod
    def sample(self) -> AbstractContextManager[ActivationSource]:
        """Returns a source of activations that stay, at its first batch."""

    @property
    @abstractmethod
    def is_checkpoint_due(self) -> bool:
        """Whether activations could go after a checkpoint of the present position."""

    @abstractmethod
    def is_being_saved(self, written: "Future[None]") -> None:
        """Takes the promise of a checkpoint with the present position."""


@contextlib.contextmanager
def lasting(source: ActivationSource) -> Iterator[ActivationSource]:
    """Yields a source that can be read from and moved back: `source` itself, where its activations stay."""
    if isinstance(source, PassingSource):
        with source.sample() as sample:
            yield sample
    else:
        yield source


def read_position(
    state: Mapping[str, object], identity: Mapping[str, object], *, what: str = "batches", part: str = "epoch"
) -> tuple[int, int]:
    """Returns epoch (or another part of the data) and batch of a saved position.

    Args:
        state: what was saved.
        identity: what a position of this source depends on.
        what: is read.
        part: name of what batches are counted in.

    Raises:
        StoreError: the state is of a source with other data or settings; the first differing one is named.
    """
    for key, value in identity.items():
        if state.get(key) != value:
            raise StoreError(f"{what}: saved with {key} {state.get(key)!r}, needs {value!r} to go on exactly there")
    number, batch = state[part], state["batch"]
    assert isinstance(number, int)
    assert isinstance(batch, int)
    return number, batch
