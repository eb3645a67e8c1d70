"""One shard of activations: a zarr v3 shard file, written at once, and read by offset without zarr.

A shard file is a row of chunks, each followed by its crc32c, then the index: offset and length of each chunk, and the index's
own crc32c (zarr v3 specification, sharding-indexed codec 1.0). zarr's own readers take it as it is. A chunk holds few tokens,
so that a window of a training mixes pieces of many documents, and is the unit of reading and of checking: what is read is
checked each time, and nothing else has to be read for it.
"""

import os
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import Blosc, Zstd
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from saekit.activations.codec import AnyArray
from saekit.errors import StoreError

__all__ = ["CHUNK_TOKENS", "ChunkShape", "Compression", "ShardFile", "chunk_bounds", "chunk_shape", "write_shard_file"]

Compression = Literal["none", "lz4", "zstd", "zstd_bitshuffle"]

CHUNK_TOKENS = 32
"""Tokens of a chunk: 48 KiB at 768 bfloat16, 256 KiB at 4,096. Fewer mix more documents in the same memory, more are read faster."""

_CRC_BYTES = 4
_INDEX_TYPE = np.dtype("<u8")
# The most that one call of the system takes.
_MAX_BUFFERS = 1024

Bytes = npt.NDArray[np.uint8]


class ChunkShape(NamedTuple):
    """What a chunk holds: whole rows, or a part of one."""

    rows: int
    """Token rows."""
    positions: int
    """Positions of each; the last part of a row is filled up with zeros."""

    def num_chunks(self, num_rows: int, context_len: int) -> int:
        """Returns the chunks of so many rows; the last rows are filled up as well."""
        return -(-num_rows // self.rows) * -(-context_len // self.positions)


def chunk_shape(context_len: int) -> ChunkShape:
    """Returns the shape of the chunks in a cache of rows of this length; the same for all of its hook points."""
    if context_len <= CHUNK_TOKENS:
        return ChunkShape(CHUNK_TOKENS // context_len, context_len)
    parts = -(-context_len // CHUNK_TOKENS)
    return ChunkShape(1, -(-context_len // parts))


def chunk_bounds(num_rows: int, context_len: int, shape: ChunkShape) -> npt.NDArray[np.int64]:
    """Returns the flat index (`row * T + position`) at which each chunk of a shard begins, and where the last one ends."""
    rows = np.arange(0, num_rows, shape.rows, dtype=np.int64) * context_len
    starts = rows[:, None] + np.arange(0, context_len, shape.positions, dtype=np.int64)
    return np.append(starts.ravel(), num_rows * context_len)


def write_shard_file(
    group_path: Path, name: str, array: AnyArray, *, shape: ChunkShape, compression: Compression, dtype: str
) -> str:
    """Writes `[rows, T, W]` as one shard of a zarr array, and returns the crc32c of its file as hexadecimal digits.

    Args:
        group_path: of the zarr group that gets the array.
        dtype: of the activations, for the array's attributes.

    Raises:
        OSError: as the file system says it.
    """
    rows, context_len, width = array.shape
    padded = (-(-rows // shape.rows) * shape.rows, -(-context_len // shape.positions) * shape.positions, width)
    with warnings.catch_warnings():
        # Says that other readers may not know all codecs.
        warnings.filterwarnings("ignore", module="zarr")
        zarr.open_group(group_path, mode="a", zarr_format=3).create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(*shape, width),
            shards=padded,
            compressors=[*_zarr_codecs(compression, array.itemsize), Crc32cCodec()],
            fill_value=0,
            attributes={"dtype": dtype},
        )
    path = group_path / name / "c" / "0" / "0" / "0"
    path.parent.mkdir(parents=True)
    codec = _compressor(compression, array.itemsize)
    spans, offset, crc = [], 0, 0
    with path.open("wb", buffering=0) as file:
        pending: list[Bytes | bytes] = []
        for chunk in _chunks_of(array, shape):
            data = chunk if codec is None else np.frombuffer(codec.encode(chunk), np.uint8)
            end = google_crc32c.value(data).to_bytes(_CRC_BYTES, "little")
            crc = google_crc32c.extend(google_crc32c.extend(crc, data), end)
            spans.append((offset, len(data) + _CRC_BYTES))
            offset += len(data) + _CRC_BYTES
            pending += [data, end]
            if len(pending) >= _MAX_BUFFERS:
                _write_all(file.fileno(), pending)
                pending = []
        index = np.array(spans, _INDEX_TYPE).tobytes()
        index += google_crc32c.value(index).to_bytes(_CRC_BYTES, "little")
        _write_all(file.fileno(), [*pending, index])
    return f"{google_crc32c.extend(crc, index):08x}"


def _chunks_of(array: AnyArray, shape: ChunkShape) -> "list[Bytes]":
    chunks = []
    for row in range(0, len(array), shape.rows):
        for position in range(0, array.shape[1], shape.positions):
            chunk = array[row : row + shape.rows, position : position + shape.positions]
            if chunk.shape[:2] != shape:
                whole = np.zeros((*shape, array.shape[2]), array.dtype)
                whole[: chunk.shape[0], : chunk.shape[1]] = chunk
                chunk = whole
            chunks.append(chunk.reshape(-1).view(np.uint8))
    return chunks


def _write_all(handle: int, buffers: "list[Bytes | bytes]") -> None:
    views = [memoryview(buffer) for buffer in buffers]
    while views:
        written = os.writev(handle, views[:_MAX_BUFFERS])
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


def _zarr_codecs(compression: Compression, item_bytes: int) -> list[BloscCodec | ZstdCodec]:
    if compression == "none":
        return []
    if compression == "zstd":
        return [ZstdCodec(level=1)]
    return [_blosc_codec(compression, item_bytes)]


def _blosc_codec(compression: Compression, item_bytes: int) -> BloscCodec:
    if compression == "lz4":
        return BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=item_bytes)
    return BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=item_bytes)


def _compressor(compression: Compression, item_bytes: int) -> Blosc | Zstd | None:
    if compression == "none":
        return None
    if compression == "zstd":
        return Zstd(level=1)
    return Blosc(
        cname="lz4" if compression == "lz4" else "zstd", clevel=1, shuffle=Blosc.BITSHUFFLE, typesize=item_bytes
    )


class ShardFile:
    """The open file of one shard; safe to read from several threads."""

    def __init__(
        self, path: Path, *, num_chunks: int, chunk_bytes: int, item_bytes: int, compression: Compression
    ) -> None:
        """Opens the file and reads its index.

        Args:
            chunk_bytes: of a chunk, decompressed.

        Raises:
            StoreError: it cannot be read, or its index is damaged.
        """
        self._path = path
        self._chunk_bytes = chunk_bytes
        self._codec = _compressor(compression, item_bytes)
        size = num_chunks * 2 * _INDEX_TYPE.itemsize
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        index = np.empty(size + _CRC_BYTES, np.uint8)
        self._read(os.fstat(self._handle).st_size - len(index), [index])
        if google_crc32c.value(index[:size]) != _stored(index[size:]):
            raise self._unreadable("its index has changed since it was written")
        self._spans: list[list[int]] = index[:size].view(_INDEX_TYPE).reshape(-1, 2).tolist()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read_chunk(self, chunk: int, out: Bytes) -> None:
        """Reads the first `len(out)` bytes of a chunk into `out` and checks all of the chunk.

        Raises:
            StoreError: it cannot be read, or has changed since it was written.
        """
        offset, size = self._spans[chunk]
        if self._codec is not None:
            stored = np.empty(size, np.uint8)
            self._read(offset, [stored])
            self._check(chunk, google_crc32c.value(stored[:-_CRC_BYTES]), stored[-_CRC_BYTES:])
            whole = len(out) == self._chunk_bytes
            data = self._codec.decode(stored[:-_CRC_BYTES], out if whole else None)
            if not whole:
                out[:] = np.frombuffer(data, np.uint8)[: len(out)]
            return
        rest = np.empty(self._chunk_bytes - len(out) + _CRC_BYTES, np.uint8)
        self._read(offset, [out, rest])
        crc = google_crc32c.value(out)
        if len(rest) > _CRC_BYTES:
            crc = google_crc32c.extend(crc, rest[:-_CRC_BYTES])
        self._check(chunk, crc, rest[-_CRC_BYTES:])

    def _read(self, offset: int, buffers: list[Bytes]) -> None:
        needed = sum(map(len, buffers))
        try:
            found = os.preadv(self._handle, buffers, offset)
            if found != needed:
                # A signal, or a file that is too short: all of it once more, piece by piece.
                whole = np.empty(needed, np.uint8)
                found = _read_slowly(self._handle, offset, whole)
                for buffer, part in zip(
                    buffers, np.split(whole, np.cumsum([len(b) for b in buffers])[:-1]), strict=True
                ):
                    buffer[:] = part
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        if found != needed:
            raise self._unreadable(f"{found:,} bytes at {offset:,}, needs {needed:,}")

    def _check(self, chunk: int, found: int, expected: Bytes) -> None:
        if found != _stored(expected):
            raise self._unreadable(f"chunk {chunk} has changed since it was written (crc32c differs)")

    def _unreadable(self, what: str) -> StoreError:
        return StoreError(
            f"{str(self._path)!r}: {what}; run 'saekit verify --repair' on the cache, then the cache command again to make"
            " the shard anew"
        )


def _stored(crc: Bytes) -> int:
    return int.from_bytes(crc.tobytes(), "little")


def _read_slowly(handle: int, offset: int, out: Bytes) -> int:
    filled = 0
    while filled < len(out) and (part := os.preadv(handle, [out[filled:]], offset + filled)):
        filled += part
    return filled
