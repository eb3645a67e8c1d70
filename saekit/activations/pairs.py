"""Two hook points of one cache side by side: what a transcoder reads and what it predicts, token by token."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.activations.rows import NORMAL
from saekit.activations.store import ActivationStore
from saekit.errors import StoreError

__all__ = ["PairedStore"]


class PairedStore(ActivationStore):
    """Pairs of activations [.., inputs.d_in + targets.d_in], the input first; a token is normal where it is at both.

    Views, splits and shuffled batches work as on any store. `hook_point` and `statistics` are the input's.

    Attributes:
        inputs: the store of what is read.
        targets: the store of what is predicted.
    """

    def __init__(self, inputs: ActivationStore, targets: ActivationStore) -> None:
        """Reads no activations.

        Raises:
            StoreError: the stores are of different caches.
        """
        if inputs.sha256 != targets.sha256:
            raise StoreError(
                f"cache {str(targets.path)!r}: another cache than {str(inputs.path)!r}, pairs need two hook points of one"
            )
        self.inputs = inputs
        self.targets = targets
        self.path = inputs.path
        self.config = inputs.config
        self.hook_point = inputs.hook_point
        self.hook_points = inputs.hook_points
        self.d_in = inputs.d_in + targets.d_in
        self.dtype = inputs.dtype
        self.num_rows = inputs.num_rows
        self.context_len = inputs.context_len
        self.num_documents = inputs.num_documents
        self.num_tokens = inputs.num_tokens
        self.statistics = inputs.statistics
        self._manifest = inputs._manifest
        self._index = inputs._index

    @functools.cached_property
    def _kinds_and_norms(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        own, other = self.inputs.kinds(), self.targets.kinds()
        return np.where(own == NORMAL, other, own), self.inputs.norms()

    def read_rows(self, rows: npt.NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Returns `[n, T, D]` pairs of rows, in any order, in the stored dtype."""
        return torch.cat([self.inputs.read_rows(rows), self.targets.read_rows(rows)], dim=-1)

    def read_tokens(self, flat: npt.NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Returns `[n, D]` pairs of tokens (`row * T + position`), in any order, in the stored dtype."""
        return torch.cat([self.inputs.read_tokens(flat), self.targets.read_tokens(flat)], dim=-1)

    def __repr__(self) -> str:
        return f"PairedStore({self.inputs!r}, {self.targets!r})"
