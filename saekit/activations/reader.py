"""Activations of one hook point by row or by token, over all of its shards."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from saekit.activations.layout import ShardRecord, file_problems, shard_name
from saekit.activations.stored import AnyArray, Chunks, numpy_dtype, to_torch
from saekit.errors import StoreError

__all__ = ["ShardReader"]

# Each open shard maps its chunk files; the system allows 65,530 mappings a process by default.
_OPEN_SHARDS = 512

Indices = npt.NDArray[np.int64]


class ShardReader:
    """Reads shards that together hold rows 0 to R - 1; safe to call from several threads.

    Each shard's files are compared with their checksums when it is first read: a flipped bit must not become a weight.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardRecord], *, context_len: int) -> None:
        """Touches no file.

        Args:
            folder: of the hook point.
            shards: in order of rows, at least one.
        """
        self.context_len = context_len
        self.d_in = shards[0].d_in
        self.dtype = shards[0].dtype
        self.num_rows = sum(shard.span.num_rows for shard in shards)
        self._folder = folder
        self._shards = shards
        self._first_rows = np.array([shard.span.first_row for shard in shards], np.int64)
        self._sound: set[int] = set()
        self._chunks = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def rows(self, rows: Indices) -> Tensor:
        """Returns `[n, T, D]` in the stored dtype, for rows in any order."""
        ascending, order = _ascending(rows, self.num_rows, "row")
        out = np.empty((len(rows), self.context_len, self.d_in), numpy_dtype(self.dtype))
        for shard, part in self._parts(ascending):
            self._chunks(shard).rows(ascending[part] - self._first_rows[shard], out[part])
        return to_torch(_restored(out, order), self.dtype)

    def tokens(self, flat: Indices) -> Tensor:
        """Returns `[n, D]` in the stored dtype, for flat indices (`row * T + position`) in any order."""
        ascending, order = _ascending(flat, self.num_rows * self.context_len, "token")
        out = np.empty((len(flat), self.d_in), numpy_dtype(self.dtype))
        for shard, part in self._parts(ascending // self.context_len):
            first = self._first_rows[shard] * self.context_len
            self._chunks(shard).tokens(ascending[part] - first, out[part])
        return to_torch(_restored(out, order), self.dtype)

    def _parts(self, rows: Indices) -> list[tuple[int, slice]]:
        """Returns (shard, place in `rows`) for ascending rows."""
        bounds = np.append(np.searchsorted(rows, self._first_rows), len(rows))
        used = np.flatnonzero(np.diff(bounds)).tolist()
        return [(shard, slice(int(bounds[shard]), int(bounds[shard + 1]))) for shard in used]

    def _open(self, shard: int) -> Chunks:
        record = self._shards[shard]
        if shard not in self._sound:
            if problems := file_problems(self._folder, record, verify=True):
                raise StoreError(
                    f"{str(self._folder)!r}: shard {record.span.index}: {problems[0]}; run 'saekit verify --repair' on the "
                    "cache, then the cache command again to make it anew"
                )
            # Kept apart from the open maps, of which old ones are let go.
            self._sound.add(shard)
        path = self._folder / shard_name(record.span.index) / "activations"
        return Chunks(path, chunk_shape=(record.chunk_rows, self.context_len, self.d_in), dtype=self.dtype)


def _ascending(wanted: Indices, size: int, what: str) -> tuple[Indices, Indices | None]:
    """Returns the wanted places in ascending order, and where they stood; None where they are ascending already."""
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= size):
        bad = int(wanted.min()) if wanted.min() < 0 else int(wanted.max())
        raise StoreError(f"{what} {bad}: outside the cache, needs 0 to {size - 1}")
    if np.all(wanted[1:] >= wanted[:-1]):
        return wanted, None
    order = np.argsort(wanted, kind="stable")
    return wanted[order], order


def _restored(ascending: AnyArray, order: Indices | None) -> AnyArray:
    if order is None:
        return ascending
    out = np.empty_like(ascending)
    out[order] = ascending
    return out
