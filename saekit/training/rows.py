"""Batches of whole token rows, for losses that go through the language model."""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.activations.rows import NORMAL, PADDING
from saekit.activations.source import read_position
from saekit.activations.view import StoreView
from saekit.errors import ConfigError, StoreError

__all__ = ["RowBatch", "TokenRowBatches"]


class RowBatch(NamedTuple):
    """Some token rows with their activations at the hook point."""

    tokens: Tensor
    """Ids [R, T] int64."""
    hidden: Tensor
    """Stored activations of every position [R, T, d_in], float32."""
    is_replaced: Tensor
    """Which positions the SAE reconstructs [R, T] bool: the training tokens."""
    is_counted: Tensor
    """Which positions' predictions count [R, T] bool: training tokens whose next token is one as well, of the same document."""
    is_padding: Tensor
    """[R, T] bool."""

    @property
    def attention_mask(self) -> Tensor | None:
        """[R, T], 1 for tokens and 0 for padding; None without padding."""
        return (~self.is_padding).long() if bool(self.is_padding.any()) else None

    def split(self, rows: int) -> list[Self]:
        """Returns the batch in parts of so many rows."""
        return [type(self)(*part) for part in zip(*(torch.split(value, rows) for value in self), strict=True)]

    def to(self, device: torch.device) -> Self:
        """Returns the batch on a device."""
        return type(self)(*(value.to(device) for value in self))


class TokenRowBatches:
    """Endless epochs of a view's rows in random order, an equal part of every global batch for each rank.

    An `ActivationSource` as well, whose batches are the training tokens of the rows.

    Attributes:
        view: what is read; rows without any of its tokens are left out.
    """

    def __init__(self, view: StoreView, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Reads no activations yet.

        Args:
            view: training tokens.
            batch_size: positions of a global batch.
            seed: of the order.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ConfigError: the batch is no equal number of whole rows for every rank.
            StoreError: the view has fewer rows than one batch.
        """
        share, rest = divmod(batch_size, view.store.context_len * world_size)
        if rest or not share:
            raise ConfigError(
                f"training: batch_size {batch_size}, needs a multiple of {view.store.context_len * world_size:,}: whole rows of "
                f"{view.store.context_len} tokens for each process"
            )
        self.view = view
        self._rows = view.rows()
        self._share = share
        self._batch_rows = share * world_size
        self._rank = rank
        self._seed = seed
        self._epoch = self._batch = 0
        self._per_epoch = len(self._rows) // self._batch_rows
        if not self._per_epoch:
            raise StoreError(
                f"batches: {len(self._rows)} token rows to train on, one batch over all ranks needs {self._batch_rows};"
                " cache more tokens or lower training.batch_size"
            )

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.view.d_in

    def next_rows(self) -> RowBatch:
        """Returns this rank's part of the next batch."""
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._rows)
        start = self._batch * self._batch_rows + self._rank * self._share
        self._batch += 1
        if self._batch == self._per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
        return self._read(order[start : start + self._share])

    def next_batch(self) -> Tensor:
        """Returns the training tokens [n, d_in] float32 of this rank's part of the next batch; n varies with the rows."""
        batch = self.next_rows()
        return batch.hidden[batch.is_replaced]

    def state_dict(self) -> dict[str, object]:
        """Returns the position and what it depends on, as JSON values; the same on every rank."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Moves to the position of a source over the same rows, seed and batch size.

        Raises:
            StoreError: the state is of a source with other data or settings; the first differing one is named.
        """
        self._epoch, self._batch = read_position(state, self._identity)

    @property
    def _identity(self) -> dict[str, object]:
        return {
            "seed": self._seed,
            "batch_rows": self._batch_rows,
            "store": self.view.store.sha256,
            "hook_point": self.view.store.hook_point,
            "tokens": self.view.fingerprint,
        }

    def _read(self, rows: npt.NDArray[np.int64]) -> RowBatch:
        store = self.view.store
        kinds, documents = store.kinds()[rows], store.documents()[rows]
        is_replaced = self.view.mask[rows] & (kinds == NORMAL)
        is_counted = np.zeros_like(is_replaced)
        same = documents[:, :-1] == documents[:, 1:]
        is_counted[:, :-1] = is_replaced[:, :-1] & is_replaced[:, 1:] & same
        return RowBatch(
            tokens=torch.from_numpy(store.tokens()[rows].astype(np.int64)),
            hidden=store.read_rows(rows).float(),
            is_replaced=torch.from_numpy(is_replaced),
            is_counted=torch.from_numpy(is_counted),
            is_padding=torch.from_numpy(kinds == PADDING),
        )
