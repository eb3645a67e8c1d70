"""One shard of activations: a zarr v3 shard file, written at once, and read by offset without zarr.

A shard file is a row of chunks, each followed by its crc32c, then the index: offset and length of each chunk, and the index's
own crc32c (zarr v3 specification, sharding-indexed codec 1.0). zarr's own readers take it as it is. Before the first chunk, where
the index leaves room, stand 64 bytes that say which shard of which cache it is. A chunk holds few tokens, so that a window of a
training mixes pieces of many documents, and is the unit of reading and of checking: what is read is checked each time, and
nothing else has to be read for it.
"""

import errno
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import Blosc, Zstd
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from saekit.activations.chunks import ChunkShape
from saekit.activations.codec import AnyArray
from saekit.errors import ResourceError, StoreError

__all__ = ["Bytes", "Compression", "PlainChunks", "ShardFile", "write_shard_file"]

Compression = Literal["none", "lz4", "zstd", "zstd_bitshuffle"]

# Copies between places that lie differently to lines of the cache are several times slower on some processors.
_ALIGNMENT = 64
_CRC_BYTES = 4
_INDEX_TYPE = np.dtype("<u8")
# Written at a time: 37 MB in one call took 100 ms of CPU time on ext4 (Linux 6), in calls of 0.6 MB 15 ms.
_WRITE_BYTES = 2**19
# Read at a time, so that it is still near the processor when it is checked.
_READ_BYTES = 2**20
# The most that one call of the system takes.
_MAX_BUFFERS = 1024

Bytes = npt.NDArray[np.uint8]


def write_shard_file(
    group_path: Path,
    name: str,
    array: AnyArray,
    *,
    shape: ChunkShape,
    compression: Compression,
    dtype: str,
    mark: bytes,
) -> str:
    """Writes `[rows, T, W]` as one shard of a zarr array, and returns the crc32c of its file as hexadecimal digits.

    Args:
        group_path: of the zarr group that gets the array.
        dtype: of the activations, for the array's attributes.
        mark: as `shard_mark` makes it.

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
    spans, offset, written, crc = [], len(mark), 0, google_crc32c.value(mark)
    with path.open("wb", buffering=0) as file:
        pending: list[Bytes | bytes] = [mark]
        for chunk in _chunks_of(array, shape):
            data = chunk if codec is None else np.frombuffer(codec.encode(chunk), np.uint8)
            size = len(data) + _CRC_BYTES
            end = google_crc32c.value(data).to_bytes(_CRC_BYTES, "little") + bytes(-size % _ALIGNMENT)
            crc = google_crc32c.extend(google_crc32c.extend(crc, data), end)
            spans.append((offset, size))
            offset += len(data) + len(end)
            pending += [data, end]
            if offset - written >= _WRITE_BYTES:
                _write_all(file.fileno(), pending)
                pending, written = [], offset
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
    left = [memoryview(buffer) for buffer in buffers]  # type: ignore[arg-type]  # arrays are buffers
    while left:
        left = _after(left, os.writev(handle, left[:_MAX_BUFFERS]))


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


class PlainChunks(NamedTuple):
    """Where some chunks lie in a file, each followed by its crc32c."""

    file: int
    """As the system numbers open files."""
    offsets: npt.NDArray[np.int64]
    """Where each chunk begins."""
    length: int
    """Bytes of a chunk."""


class ShardFile:
    """The open file of one shard; safe to read from several threads."""

    def __init__(
        self,
        path: Path | str,
        *,
        num_chunks: int,
        chunk_bytes: int,
        item_bytes: int,
        compression: Compression,
        mark: bytes,
    ) -> None:
        """Opens the file and reads its mark and its index.

        Args:
            chunk_bytes: of a chunk, decompressed.
            mark: of the shard that it has to be.

        Raises:
            ResourceError: too many files are open.
            StoreError: it cannot be read, is another shard's, or its index is damaged.
        """
        self._path = path
        self._chunk_bytes = chunk_bytes
        self._stride = chunk_bytes + _CRC_BYTES + -(chunk_bytes + _CRC_BYTES) % _ALIGNMENT
        self._run = max(1, min(_READ_BYTES // chunk_bytes, _MAX_BUFFERS // 3))
        self._codec = _compressor(compression, item_bytes)
        size = num_chunks * 2 * _INDEX_TYPE.itemsize
        end = self._open()
        found = np.empty(len(mark), np.uint8)
        self._read(0, [found], len(found))
        if found.tobytes() != mark:
            raise self._unreadable("belongs to another cache, hook point or place, or has changed since it was written")
        index = np.empty(size + _CRC_BYTES, np.uint8)
        self._read(max(0, end - len(index)), [index], len(index))
        if _crc_bytes(index[:size]) != index[size:].tobytes():
            raise self._unreadable("its index has changed since it was written")
        # Of thousands of shards at a time: lists take ten times as much.
        self._spans = index[:size].view(_INDEX_TYPE).astype(np.int64).reshape(-1, 2)

    def _open(self) -> int:
        """Opens the file and returns its length."""
        try:
            self._handle = os.open(self._path, os.O_RDONLY)
            return os.fstat(self._handle).st_size
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise ResourceError(f"{str(self._path)!r}: too many open files, needs a higher 'ulimit -n'") from error
            raise self._unreadable(error.strerror or str(error)) from error

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def plain_chunks(self, chunks: npt.NDArray[np.int64]) -> PlainChunks | None:
        """Returns where chunks lie in this file as they are; None where they are compressed."""
        if self._codec is not None:
            return None
        return PlainChunks(self._handle, self._spans[chunks, 0], self._chunk_bytes)

    def read_chunks(self, chunks: list[int], sizes: list[int], out: Bytes) -> None:
        """Reads the first bytes of each chunk into `out`, one chunk after another, and checks all of each chunk.

        Args:
            chunks: ascending; neighbours are read in one go.
            sizes: how many bytes of each, decompressed.

        Raises:
            StoreError: it cannot be read, or has changed since it was written.
        """
        if self._codec is not None:
            self._read_compressed(chunks, sizes, out)
            return
        # Where this runs, it does for every few thousand numbers of a training: each step of the interpreter shows.
        spans, whole, stride, crc_of = (
            self._spans[chunks, 0].tolist(),
            self._chunk_bytes,
            self._stride,
            google_crc32c.value,
        )
        ends = np.empty((len(chunks), stride - whole), np.uint8)
        found: list[int] = []
        place, first = 0, 0
        while first < len(chunks):
            offset = at = spans[first]
            buffers: list[Bytes] = []
            last = first
            # Neighbours: each into its place, what lies between them aside.
            while last < len(chunks) and last - first < self._run and spans[last] == at:
                size = sizes[last]
                buffers.append(out[place : place + size])
                if size < whole:
                    buffers.append(np.empty(whole - size, np.uint8))
                buffers.append(ends[last])
                place, at, last = place + size, at + stride, last + 1
            self._read(offset, buffers, at - offset)
            index = 0
            for size in sizes[first:last]:
                crc = crc_of(buffers[index])
                if size < whole:
                    index += 1
                    crc = google_crc32c.extend(crc, buffers[index])
                found.append(crc)
                index += 2
            first = last
        expected = np.ascontiguousarray(ends[:, :_CRC_BYTES]).view("<u4")[:, 0]
        if len(wrong := np.flatnonzero(expected != np.array(found, np.uint32))):
            raise self._damaged(chunks[wrong[0]])

    def _read_compressed(self, chunks: list[int], sizes: list[int], out: Bytes) -> None:
        start = 0
        for chunk, size, (offset, length) in zip(chunks, sizes, self._spans[chunks].tolist(), strict=True):
            stored = np.empty(length, np.uint8)
            self._read(offset, [stored], length)
            self._take(chunk, stored, out[start : start + size])
            start += size

    def _take(self, chunk: int, stored: Bytes, target: Bytes) -> None:
        """Checks a chunk as it is in the file, its crc32c included, and puts its first bytes into `target`."""
        data = stored[:-_CRC_BYTES]
        if _crc_bytes(data) != stored[-_CRC_BYTES:].tobytes():
            raise self._damaged(chunk)
        if self._codec is None:
            target[:] = data[: len(target)]
        elif len(target) == self._chunk_bytes:
            self._codec.decode(data, target)
        else:
            target[:] = np.frombuffer(self._codec.decode(data), np.uint8)[: len(target)]

    def _read(self, offset: int, buffers: Sequence[Bytes], needed: int) -> None:
        try:
            found = part = os.preadv(self._handle, buffers, offset)  # type: ignore[arg-type]  # arrays are buffers
            if found < needed:
                # After a signal, or where one call gives less than asked for.
                left = [memoryview(buffer) for buffer in buffers]  # type: ignore[arg-type]  # arrays are buffers
                while part and found < needed:
                    left = _after(left, part)
                    part = os.preadv(self._handle, left, offset + found)
                    found += part
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        if found != needed:
            raise self._unreadable(f"{found:,} bytes at {offset:,}, needs {needed:,}")

    def _damaged(self, chunk: int) -> StoreError:
        return self._unreadable(f"chunk {chunk} has changed since it was written (crc32c differs)")

    def _unreadable(self, what: str) -> StoreError:
        return StoreError(
            f"{str(self._path)!r}: {what}; run 'saekit verify --repair' on the cache, then the cache command again to make"
            " the shard anew"
        )


def _crc_bytes(data: Bytes) -> bytes:
    crc: int = google_crc32c.value(data)
    return crc.to_bytes(_CRC_BYTES, "little")


def _after(buffers: list[memoryview], taken: int) -> list[memoryview]:
    """Returns what follows the first bytes of some buffers."""
    for place, buffer in enumerate(buffers):
        if taken < len(buffer):
            return [buffer[taken:], *buffers[place + 1 :]] if taken else buffers[place:]
        taken -= len(buffer)
    return []
