"""One read of a store for several trainings: each has a position of its own in the same batches."""

from torch import Tensor

from saekit.activations.shuffle import ShuffledBatches

__all__ = ["SharedBatches", "Tap"]


class SharedBatches:
    """Batches that several trainings take in step; the newest one is kept for those that have not taken it yet.

    Attributes:
        num_reads: batches read so far.
    """

    def __init__(self, batches: ShuffledBatches) -> None:
        """Takes a source that nobody else reads from."""
        self.batches = batches
        self.num_reads = 0
        self._newest: tuple[tuple[int, int], Tensor] | None = None

    def at(self, epoch: int, batch: int) -> Tensor:
        """Returns the batch [N, d_in] at a position; not to be changed in place."""
        if self._newest is None or self._newest[0] != (epoch, batch):
            if (self.batches.epoch, self.batches.batch) != (epoch, batch):
                self.batches.load_state_dict(self.batches.state_dict() | {"epoch": epoch, "batch": batch})
            self._newest = (epoch, batch), self.batches.next_batch()
            self.num_reads += 1
        return self._newest[1]


class Tap:
    """An `ActivationSource` with the batches of a shared one; its positions are those of a source of one's own."""

    def __init__(self, shared: SharedBatches) -> None:
        """Begins at the first batch, wherever others are by now: each training measures its data there."""
        self._shared = shared
        self._epoch, self._batch = 0, 0

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self._shared.batches.d_in

    def next_batch(self) -> Tensor:
        """Returns the next `[N, d_in]` float32 batch of this rank."""
        batch = self._shared.at(self._epoch, self._batch)
        self._batch += 1
        if self._batch == self._shared.batches.batches_per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
        return batch

    def state_dict(self) -> dict[str, object]:
        """Returns the position, as `ShuffledBatches` would."""
        return self._shared.batches.state_dict() | {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to a position.

        Raises:
            StoreError: the state is of a source with other data or settings.
        """
        batches = self._shared.batches
        batches.load_state_dict(state)
        self._epoch, self._batch = batches.epoch, batches.batch
