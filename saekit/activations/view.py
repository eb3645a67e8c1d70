"""A part of a store: which tokens, and how they are read in order."""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saekit.activations.rows import NORMAL
from saekit.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from saekit.activations.store import ActivationStore

__all__ = ["StoreView", "split_documents"]


_SCANNED_TOKENS = 16_384


class StoreView:
    """Some tokens of a store.

    Attributes:
        store: where they are.
        mask: `[R, T]` which tokens.
        origin: what the tokens were chosen by, e.g. the arguments of a split; written into the manifests of what is made
            from them, so that a change of it can be named.
    """

    def __init__(
        self, store: "ActivationStore", mask: npt.NDArray[np.bool_], *, origin: Mapping[str, object] | None = None
    ) -> None:
        """Reads nothing.

        Args:
            mask: `[R, T]`.
            origin: JSON values.
        """
        self.store = store
        self.mask = mask
        self.origin = dict(origin or {})

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.store.d_in

    @functools.cached_property
    def num_tokens(self) -> int:
        """How many tokens."""
        return int(np.count_nonzero(self.mask))

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of which tokens these are."""
        return hashlib.sha256(np.packbits(self.mask).tobytes()).hexdigest()

    @functools.cached_property
    def indices(self) -> npt.NDArray[np.int64]:
        """Flat indices of the tokens (`row * T + position`), ascending."""
        return np.flatnonzero(self.mask).astype(np.int64, copy=False)

    @functools.cached_property
    def documents(self) -> npt.NDArray[np.int32]:
        """Ids of the documents that the tokens belong to, ascending."""
        return np.unique(self.store.documents()[self.mask])

    def rows(self) -> npt.NDArray[np.int64]:
        """Returns the ids of the rows that hold any of the tokens, ascending."""
        return np.flatnonzero(self.mask.any(axis=1)).astype(np.int64, copy=False)

    def of_kind(self, kind: int) -> "StoreView":
        """Returns the tokens of another kind (2 special, 3 massive) in the same documents."""
        documents = self.store.documents()
        member = np.zeros(self.store.num_documents + 1, np.bool_)
        member[self.documents] = True
        # Padding has document -1, which is the last place of `member` and stays false.
        return StoreView(self.store, member[documents] & (self.store.kinds() == kind))

    def read(self, flat: npt.NDArray[np.int64]) -> Tensor:
        """Returns `[n, D]` float32 activations of tokens by their flat index, in any order."""
        return self.store.read_tokens(flat).to(torch.float32)

    def iter_batches(self, batch_tokens: int) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
        """Yields (`[n, D]` float32, flat indices `[n]`) in order; the last batch may be smaller."""
        for first in range(0, self.num_tokens, batch_tokens):
            flat = self.indices[first : first + batch_tokens]
            yield self.read(flat), flat

    def first_non_finite(self) -> str | None:
        """Returns the place of the first token with NaN or Inf, e.g. `row 12, position 3 of shard 0`; None where all are finite.

        Reads the view to there.
        """
        for x, flat in self.iter_batches(_SCANNED_TOKENS):
            bad = torch.nonzero(~torch.isfinite(x).all(dim=1)).flatten()
            if len(bad):
                row, position = divmod(int(flat[int(bad[0])]), self.store.context_len)
                return f"row {row}, position {position} of shard {self.store.shard_of(row)}"
        return None

    def __repr__(self) -> str:
        return f"StoreView({self.store!r}, num_tokens={self.num_tokens:,})"


def split_documents(store: "ActivationStore", *, test_fraction: float, seed: int) -> tuple[StoreView, StoreView]:
    """Returns (train, test); see `ActivationStore.split`."""
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(f"test_fraction {test_fraction!r}: needs a number between 0 and 1")
    documents, normal = store.documents(), store.kinds() == NORMAL
    tokens_of = np.bincount(documents[normal], minlength=store.num_documents)
    texts, text_of = np.unique(store.document_keys(), return_inverse=True)
    tokens_of_text = np.bincount(text_of, weights=tokens_of, minlength=len(texts)).astype(np.float64)
    order = np.argsort(_mixed(texts, seed), kind="stable")
    order = order[tokens_of_text[order] > 0]
    if len(order) < 2:
        raise StoreError(
            f"cache {str(store.path)!r}: {len(order)} document(s) with different text, a split needs at least 2;"
            " cache more text"
        )
    is_test_text = np.zeros(len(texts), np.bool_)
    is_test_text[order[_nearest_sum(tokens_of_text[order], test_fraction)]] = True
    is_test = np.append(is_test_text[text_of], False)[documents]
    origin = {"test_fraction": test_fraction, "seed": seed}
    return StoreView(store, normal & ~is_test, origin=origin), StoreView(store, normal & is_test, origin=origin)


def _nearest_sum(sizes: npt.NDArray[np.float64], fraction: float) -> list[int]:
    """Returns places, ascending, whose sizes sum to nearly `fraction` of the whole; at least one, and not all.

    Each size in turn is taken if that brings the sum nearer. Where documents are few and long, stopping at the first one
    that is too long would leave a single document on the test side.
    """
    target = fraction * float(sizes.sum())
    taken: list[int] = []
    total = 0.0
    for place, size in enumerate(sizes.tolist()):
        if size < 2 * (target - total) and len(taken) < len(sizes) - 1:
            taken.append(place)
            total += size
    return taken or [int(np.argmin(sizes))]


def _mixed(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Returns a hash of each key and the seed.

    Source: the finaliser of splitmix64, Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    z = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
