"""How the rows of a shard are cut into chunks, and which shard is told from which."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ChunkShape", "chunk_bounds", "chunk_shape", "shard_mark"]

# Smaller chunks mix more documents in the same memory, larger ones are read faster. All hook points of a cache are cut alike and may be
# read together, but below the least size of one of them checking costs more than reading.
_CHUNK_BYTES = 48 * 2**10
_LEAST_CHUNK_BYTES = 16 * 2**10
_CHUNK_TOKENS = 32


class ChunkShape(NamedTuple):
    """What a chunk holds: whole rows, or a part of one."""

    rows: int
    """Token rows."""
    positions: int
    """Positions of each; the last part of a row is filled up with zeros."""

    def num_chunks(self, num_rows: int, context_len: int) -> int:
        """Returns the chunks of so many rows; the last rows are filled up as well."""
        return -(-num_rows // self.rows) * -(-context_len // self.positions)


def chunk_shape(context_len: int, token_bytes: Sequence[int]) -> ChunkShape:
    """Returns the shape of the chunks in a cache of rows of this length; the same for all of its hook points.

    Args:
        token_bytes: of a stored activation of each hook point.
    """
    tokens = max(1, _CHUNK_BYTES // sum(token_bytes), _LEAST_CHUNK_BYTES // max(token_bytes))
    tokens = min(tokens, _CHUNK_TOKENS)
    if context_len <= tokens:
        return ChunkShape(tokens // context_len, context_len)
    parts = -(-context_len // tokens)
    return ChunkShape(1, -(-context_len // parts))


def chunk_bounds(num_rows: int, context_len: int, shape: ChunkShape) -> npt.NDArray[np.int64]:
    """Returns the flat index (`row * T + position`) at which each chunk of a shard begins, and where the last one ends."""
    rows = np.arange(0, num_rows, shape.rows, dtype=np.int64) * context_len
    starts = rows[:, None] + np.arange(0, context_len, shape.positions, dtype=np.int64)
    return np.append(starts.ravel(), num_rows * context_len)


def shard_mark(*what: object) -> bytes:
    """Returns the 64 bytes at the beginning of a shard's file: a hash of what tells it from all others."""
    return hashlib.sha256(repr(what).encode()).hexdigest().encode()
