"""Activations of one hook point by row, by token or by chunk, over all of its shards."""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from saekit.activations.chunks import chunk_bounds, shard_mark
from saekit.activations.codec import CODECS, AnyArray
from saekit.activations.layout import ShardRecord, shard_file
from saekit.activations.order import Indices, flat_of
from saekit.activations.remote import Remote
from saekit.activations.remote_shard import RemoteShardFile
from saekit.activations.shardfile import ShardFile
from saekit.activations.together import read_together
from saekit.errors import StoreError

__all__ = ["ShardReader"]

# The system allows 1,024 open files a process by default.
_OPEN_SHARDS = 256
# Elsewhere, what is kept of one is its index; several are read at a time.
_REMOTE_SHARDS = 4096
_SHARDS_AT_A_TIME = 16
# As many files as are open for one call, whichever others close meanwhile.
_SHARDS_A_CALL = 64
# What is not given out is read as well: so much of it at a time.
_BLOCK_CHUNKS = 256


class ShardReader:
    """Reads shards that together hold rows 0 to R - 1; safe to call from several threads.

    Files are read in chunks, and each chunk is compared with its checksum whenever it is read: a flipped bit must not become a
    weight. Chunks are numbered through all shards.

    Attributes:
        codec: of the stored activations.
        bounds: `[chunks + 1]` flat index at which each chunk begins, and where the last one ends.
    """

    def __init__(
        self, folder: Path, shards: Sequence[ShardRecord], *, context_len: int, remote: Remote | None = None
    ) -> None:
        """Touches no file.

        Args:
            folder: of the hook point.
            shards: in order of rows, at least one.
            remote: where their activations lie, if that is not in the folder.
        """
        self.context_len = context_len
        self.d_in = shards[0].d_in
        self.codec = CODECS[shards[0].dtype]
        self.num_rows = sum(shard.span.num_rows for shard in shards)
        self._folder = folder
        self._shards = shards
        counts = [shard.chunk.num_chunks(shard.span.num_rows, context_len) for shard in shards]
        self._first_chunks = np.append(0, np.cumsum(counts))
        parts = [
            chunk_bounds(shard.span.num_rows, context_len, shard.chunk)[:-1] + shard.span.first_row * context_len
            for shard in shards
        ]
        self.bounds: Indices = np.append(np.concatenate(parts), self.num_rows * context_len)
        self._remote = remote
        self._pool = None if remote is None else ThreadPoolExecutor(_SHARDS_AT_A_TIME, "saekit-shards")
        self._open_shard = functools.lru_cache(_OPEN_SHARDS if remote is None else _REMOTE_SHARDS)(self._open)

    def rows(self, rows: Indices) -> Tensor:
        """Returns `[n, T, D]` decoded, for rows in any order."""
        _check_range(rows, self.num_rows, "row")
        flat = (rows[:, None] * self.context_len + np.arange(self.context_len)).ravel()
        return self.tokens(flat).reshape(len(rows), self.context_len, self.d_in)

    def tokens(self, flat: Indices) -> Tensor:
        """Returns `[n, D]` decoded, for flat indices (`row * T + position`) in any order."""
        _check_range(flat, self.num_rows * self.context_len, "token")
        ascending, order = _ascending(flat)
        chunks = np.searchsorted(self.bounds, ascending, side="right") - 1
        out = np.empty((len(flat), self.codec.width(self.d_in)), self.codec.array)
        starts = np.append(np.flatnonzero(np.diff(chunks, prepend=-1)), len(chunks))
        for block in range(0, len(starts) - 1, _BLOCK_CHUNKS):
            edges = starts[block : block + _BLOCK_CHUNKS + 1]
            part, own = slice(edges[0], edges[-1]), chunks[edges[:-1]]
            all_of = flat_of(own, self.bounds)
            if np.array_equal(all_of, ascending[part]):
                self.chunks(own, out[part])
            else:
                whole = np.empty((len(all_of), out.shape[1]), out.dtype)
                self.chunks(own, whole)
                out[part] = whole[np.searchsorted(all_of, ascending[part])]
        return self.codec.decode(self.codec.to_tensor(_restored(out, order)))

    def chunks(self, chunks: Indices, out: AnyArray) -> None:
        """Reads all tokens of ascending chunks into `out` `[n, width]`, one chunk after another, in the stored form."""
        sizes = (self.bounds[chunks + 1] - self.bounds[chunks]) * (out.itemsize * out.shape[1])
        places = np.append(0, np.cumsum(sizes))
        target = out.reshape(-1).view(np.uint8)
        edges = [*np.searchsorted(chunks, self._first_chunks).tolist()]

        def read(shard: int, first: int, last: int) -> None:
            self._open_shard(shard).read_chunks(
                (chunks[first:last] - self._first_chunks[shard]).tolist(),
                sizes[first:last].tolist(),
                target[places[first] : places[last]],
            )

        parts = [(shard, *part) for shard, part in enumerate(itertools.pairwise(edges)) if part[0] < part[1]]
        if self._pool is not None:
            list(self._pool.map(read, *zip(*parts, strict=True)))
            return
        for start in range(0, len(parts), _SHARDS_A_CALL):
            some = parts[start : start + _SHARDS_A_CALL]
            first, last = some[0][1], some[-1][2]
            if not read_together(
                [self._open_shard(shard) for shard, _, _ in some],
                [chunks[part[1] : part[2]] - self._first_chunks[part[0]] for part in some],
                sizes[first:last],
                target[places[first] : places[last]],
            ):
                for part in some:
                    read(*part)

    def _open(self, shard: int) -> ShardFile:
        record = self._shards[shard]
        rows, positions = record.chunk
        name = shard_file(record.span.index)
        path = self._folder / name
        open_file: Callable[..., ShardFile] = functools.partial(ShardFile, path)
        if self._remote is not None:
            open_file = functools.partial(
                RemoteShardFile,
                self._remote.objects,
                self._remote.key(path),
                size_bytes=record.files[name].size_bytes,
            )
        return open_file(
            num_chunks=record.chunk.num_chunks(record.span.num_rows, self.context_len),
            chunk_bytes=rows * positions * self.codec.width(self.d_in) * self.codec.array.itemsize,
            item_bytes=self.codec.array.itemsize,
            compression=record.compression,
            mark=shard_mark(record.cache, record.hook_point, record.span.index),
        )


def _check_range(wanted: Indices, size: int, what: str) -> None:
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= size):
        bad = int(wanted.min()) if wanted.min() < 0 else int(wanted.max())
        raise StoreError(f"{what} {bad}: outside the cache, needs 0 to {size - 1}")


def _ascending(wanted: Indices) -> tuple[Indices, Indices | None]:
    """Returns the wanted places in ascending order, and where they stood; None where they are ascending already."""
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
