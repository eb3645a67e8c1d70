"""Several hook points of one cache side by side, token by token: what crosscoders and transcoders are trained on."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.activations.rows import NORMAL
from saekit.activations.store import ActivationStore
from saekit.errors import StoreError

__all__ = ["JoinedStore", "PairedStore"]


class JoinedStore(ActivationStore):
    """Activations [.., sum of the widths] of several hook points; a token is normal where it is at all of them.

    Views, splits and shuffled batches work as on any store. `statistics` and norms are the first hook point's.

    Attributes:
        stores: of each hook point, in order.
        hook_point: the hook points, separated by commas.
    """

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        """Reads no activations.

        Raises:
            StoreError: fewer than two stores, or stores of different caches.
        """
        if len(stores) < 2:
            raise StoreError(f"joined stores: found {len(stores)}, needs those of at least two hook points")
        first = stores[0]
        for other in stores[1:]:
            if other.sha256 != first.sha256:
                raise StoreError(
                    f"cache {str(other.path)!r}: another cache than {str(first.path)!r}, needs hook points of one"
                )
        self.stores = tuple(stores)
        self.path = first.path
        self.config = first.config
        self.hook_point = ",".join(store.hook_point for store in stores)
        self.hook_points = first.hook_points
        self.d_in = sum(store.d_in for store in stores)
        self.dtype = first.dtype
        self.num_rows = first.num_rows
        self.context_len = first.context_len
        self.num_documents = first.num_documents
        self.num_tokens = first.num_tokens
        self.statistics = first.statistics
        self._manifest = first._manifest
        self._index = first._index
        self._reader = first._reader

    @property
    def parts(self) -> tuple[ActivationStore, ...]:
        """The stores of the hook points, in order."""
        return self.stores

    @functools.cached_property
    def _kinds_and_norms(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        kinds = self.stores[0].kinds()
        for other in self.stores[1:]:
            kinds = np.where(kinds == NORMAL, other.kinds(), kinds)
        return kinds, self.stores[0].norms()

    def read_rows(self, rows: npt.NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Returns `[n, T, D]` activations of rows, in any order; in the stored dtype, float32 where it is quantised."""
        return torch.cat([store.read_rows(rows) for store in self.stores], dim=-1)

    def read_tokens(self, flat: npt.NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Returns `[n, D]` activations of tokens (`row * T + position`), in any order; in the stored dtype, float32 where it is quantised."""
        return torch.cat([store.read_tokens(flat) for store in self.stores], dim=-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.stores))})"


class PairedStore(JoinedStore):
    """Pairs of activations [.., inputs.d_in + targets.d_in]: what a transcoder reads first, then what it predicts.

    Attributes:
        inputs: the store of what is read; `hook_point` is its own.
        targets: the store of what is predicted.
    """

    def __init__(self, inputs: ActivationStore, targets: ActivationStore) -> None:
        """Reads no activations.

        Raises:
            StoreError: the stores are of different caches.
        """
        super().__init__((inputs, targets))
        self.inputs = inputs
        self.targets = targets
        self.hook_point = inputs.hook_point
