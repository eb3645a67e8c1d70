"""Sparse codes: what the encoders return, one view of both layouts, and the reverse index that both backwards share."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class TopKCode(NamedTuple):
    """k features per token, in order of falling pre-activation, ties in order of rising index.

    values: [N, k] relu of the selected pre-activations, float32 (float64 for float64 operands).
    indices: [N, k] int64 in [0, F), no index twice in a row.
    """

    values: Tensor
    indices: Tensor


class ThresholdCode(NamedTuple):
    """CSR of the entries above the lower edge of their band; indices rise within a row.

    pre_acts: [nnz] pre-activations, not gated, float32 (float64 for float64 operands).
    indices: [nnz] int64 in [0, F).
    offsets: [N + 1] int64; row n owns the entries offsets[n] to offsets[n + 1].
    """

    pre_acts: Tensor
    indices: Tensor
    offsets: Tensor


class BatchTopKCode(NamedTuple):
    """CSR of the largest entries of a batch; indices rise within a row.

    values: [nnz] > 0, float32 (float64 for float64 operands).
    indices: [nnz] int64 in [0, F).
    offsets: [N + 1] int64; row n owns the entries offsets[n] to offsets[n + 1].
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """Where the entries of a code sit: one view of [N, K] pairs and of CSR.

    indices: [nnz] feature of each entry, row after row.
    num_rows: N.
    width: K for pairs, None for CSR.
    csr_offsets: [N + 1] for CSR, None for pairs.
    is_unique: no index stands twice in a row, as in every encoder's code.
    """

    indices: Tensor
    num_rows: int
    width: int | None = None
    csr_offsets: Tensor | None = None
    is_unique: bool = False

    @property
    def row_offsets(self) -> Tensor:
        """[N + 1] int64: first entry of each row, and nnz."""
        if self.csr_offsets is not None:
            return self.csr_offsets
        assert self.width is not None
        return torch.arange(self.num_rows + 1, device=self.indices.device) * self.width

    def rows(self, order: Tensor | None = None) -> Tensor:
        """[nnz] int64: row of each entry, or of the entries named by `order`."""
        if self.width is not None:
            places = torch.arange(self.indices.numel(), device=self.indices.device) if order is None else order
            return places // max(self.width, 1)
        assert self.csr_offsets is not None
        counts = self.csr_offsets.diff()
        row_ids = torch.arange(self.num_rows, device=self.indices.device)
        rows = row_ids.repeat_interleave(counts, output_size=self.indices.numel())
        return rows if order is None else rows[order]


class ReverseIndex:
    """The entries of a code sorted by feature (CSC), built at first use and then shared by everything that asks.

    The sort is stable, so a feature's entries stay in token order and sums over them are bit-reproducible.
    """

    def __init__(self, entries: Entries, num_features: int) -> None:
        self.entries = entries
        self.num_features = num_features
        self._version = _version(entries.indices)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        # int32 keys: half the radix passes of int64 (0.43 against 0.85 ms at 65,536 entries, AMD EPYC, one thread).
        features, order = torch.sort(self.entries.indices.to(torch.int32), stable=True)
        return features, order

    @property
    def order(self) -> Tensor:
        """[nnz] int64: place in the code of each entry, feature after feature."""
        return self._sorted[1]

    @cached_property
    def rows(self) -> Tensor:
        """[nnz] int64: token of each entry, feature after feature."""
        return self.entries.rows(self.order)

    @cached_property
    def offsets(self) -> Tensor:
        """[F + 1] int64: feature f owns the entries offsets[f] to offsets[f + 1]."""
        features = self._sorted[0]
        edges = torch.arange(self.num_features + 1, device=features.device, dtype=torch.int32)
        return torch.searchsorted(features, edges)

    @property
    def is_current(self) -> bool:
        """False once the indices were changed in place."""
        return self._version == _version(self.entries.indices)

    def describes(self, entries: Entries, num_features: int) -> bool:
        """Whether this is the reverse of the same entries."""
        mine, theirs = self.entries.csr_offsets, entries.csr_offsets
        same_offsets = mine is theirs
        if mine is not None and theirs is not None:
            # The same memory is equal without a look at it, for which a device would be waited for.
            same_offsets = mine.is_set_to(theirs) or torch.equal(mine, theirs)
        return (
            self.is_current
            and same_offsets
            and num_features == self.num_features
            and entries.width == self.entries.width
            and entries.num_rows == self.entries.num_rows
        )


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def reverse_index(
    indices: Tensor, num_features: int, *, offsets: Tensor | None = None, is_unique: bool = False
) -> ReverseIndex:
    """The reverse index of a code, the same object for every op that is given the same `indices` tensor.

    It lives as long as `indices` or a graph that uses it.

    Args:
        indices: [N, K] pairs, or [nnz] with `offsets`.
        num_features: F.
        offsets: [N + 1] of a CSR code.
        is_unique: no index stands twice in a row.
    """
    entries = entries_of(indices, offsets, is_unique=is_unique)
    known = _known.get(indices)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if isinstance(known, ReverseIndex) and known.describes(entries, num_features):
        return known
    made = ReverseIndex(entries, num_features)
    _known[indices] = made
    return made


def entries_of(indices: Tensor, offsets: Tensor | None, *, is_unique: bool) -> Entries:
    """The view of a code's places that the primitives take."""
    # detach: an alias, so that the registry's values never keep their own keys alive.
    flat = indices.detach().reshape(-1)
    if offsets is not None:
        return Entries(indices=flat, num_rows=offsets.numel() - 1, csr_offsets=offsets.detach(), is_unique=is_unique)
    return Entries(indices=flat, num_rows=indices.shape[0], width=indices.shape[1], is_unique=is_unique)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
