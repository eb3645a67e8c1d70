"""One shard of activations that lies elsewhere, read in ranges."""

from collections.abc import Sequence

import numpy as np

from saekit.activations.objects import Objects
from saekit.activations.shardfile import Bytes, Compression, ShardFile

__all__ = ["RemoteShardFile"]

# Between two chunks it costs less to read so many bytes that nobody wants than to ask twice.
_GAP_BYTES = 64 * 2**10
# Of one request: several are on their way at a time.
_RANGE_BYTES = 4 * 2**20


class RemoteShardFile(ShardFile):
    """A shard on an object store or a web server; safe to read from several threads."""

    def __init__(
        self,
        objects: Objects,
        key: str,
        *,
        size_bytes: int,
        num_chunks: int,
        chunk_bytes: int,
        item_bytes: int,
        compression: Compression,
        mark: bytes,
    ) -> None:
        """Reads the mark and the index.

        Args:
            objects: where it is.
            key: of its file there.
            size_bytes: of its file.
            num_chunks: in the index.
            chunk_bytes: of a chunk, decompressed.
            item_bytes: of a number.
            compression: of the chunks.
            mark: of the shard that it has to be.

        Raises:
            StoreError: it is missing, truncated, another shard's, or its index is damaged.
            ResourceError: no access or no answer.
        """
        self._objects = objects
        self._key = key
        self._size_bytes = size_bytes
        super().__init__(
            f"{objects.url}/{key}",
            num_chunks=num_chunks,
            chunk_bytes=chunk_bytes,
            item_bytes=item_bytes,
            compression=compression,
            mark=mark,
        )

    def read_chunks(self, chunks: list[int], sizes: list[int], out: Bytes) -> None:
        """Reads the first bytes of each chunk into `out`, one chunk after another, and checks all of each chunk.

        Args:
            chunks: ascending; near ones are read in one go.
            sizes: how many bytes of each, decompressed.

        Raises:
            StoreError: it is missing, truncated, or has changed since it was written.
            ResourceError: no access or no answer.
        """
        spans = self._spans[chunks].tolist()
        ranges = _ranges(spans)
        found = self._objects.stream(lambda part: self._range(spans[part.start][0], sum(spans[part.stop - 1])), ranges)
        start = 0
        for part, data in zip(ranges, found, strict=True):
            for place in part:
                offset = spans[place][0] - spans[part.start][0]
                self._take(chunks[place], data[offset : offset + spans[place][1]], out[start : start + sizes[place]])
                start += sizes[place]

    def _open(self) -> int:
        return self._size_bytes

    def _read(self, offset: int, buffers: Sequence[Bytes], needed: int) -> None:
        data = self._range(offset, offset + needed)
        for buffer in buffers:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def _range(self, start: int, end: int) -> Bytes:
        try:
            return np.frombuffer(self._objects.read_range(self._key, start, end), np.uint8)
        except FileNotFoundError as error:
            raise self._unreadable("is missing") from error


def _ranges(spans: Sequence[Sequence[int]]) -> list[range]:
    """Returns places of ascending spans (offset, length) that are read together."""
    edges = [0]
    for place in range(1, len(spans)):
        offset, length = spans[place]
        is_far = offset - sum(spans[place - 1]) > _GAP_BYTES
        if is_far or offset + length - spans[edges[-1]][0] > _RANGE_BYTES:
            edges.append(place)
    return [range(first, last) for first, last in zip(edges, [*edges[1:], len(spans)], strict=True)]
