"""One commit per part: written aside, flushed to disk, moved into place, then declared by its record."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from saekit.activations.chunks import ChunkShape, shard_mark
from saekit.activations.codec import AnyArray, StoredDtype
from saekit.activations.layout import (
    ACTIVATIONS_NAME,
    ShardRecord,
    ShardSpan,
    record_files,
    record_name,
    shard_file,
    shard_name,
    write_record,
)
from saekit.activations.remote import Remote
from saekit.activations.shardfile import Compression, write_shard_file
from saekit.activations.stored import write_arrays
from saekit.errors import ResourceError

__all__ = ["Shard", "ShardWriter", "remove_leftovers", "staged", "write_shard"]

_MAX_WORKERS = 4


def remove_leftovers(*folders: Path) -> None:
    """Removes what a killed process was about to move into place."""
    for folder in folders:
        for entry in folder.glob(".*.tmp"):
            _remove(entry)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields a path beside `target`; what the block makes there is flushed and takes the place of `target` at the end.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        _flush(temporary)
        _remove(target)
        temporary.rename(target)
        _flush_one(target.parent)
    except OSError as error:
        _remove(temporary)
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(
            f"{str(target)!r}: cannot be written: {error.strerror or error}; what is finished stays:"
            " run the same command again to go on"
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    entries = [*path.rglob("*"), path] if path.is_dir() else [path]
    # At once, since a journal takes what comes together together: one after another, each small file waits for a commit of its own.
    with ThreadPoolExecutor(len(entries), thread_name_prefix="saekit-flush") as pool:
        list(pool.map(_flush_one, entries))


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The contents of one shard of one hook point."""

    folder: Path
    """Of the hook point."""
    cache: str
    """Identity of the cache."""
    hook_point: str
    """Where the activations were taken."""
    span: ShardSpan
    """Which rows."""
    dtype: StoredDtype
    """Of the activations."""
    compression: Compression
    """Of their chunks."""
    chunk: ChunkShape
    """Rows and positions that a chunk holds."""
    d_in: int
    """Width of an activation."""
    activations: AnyArray
    """`[rows, T, width]` in the stored form."""
    norm: npt.NDArray[np.float32]
    """`[rows, T]`."""
    remote: Remote | None = None
    """Where it goes when it is finished; None = it stays."""


def write_shard(shard: Shard) -> ShardRecord:
    """Writes a shard and then its record.

    Raises:
        ResourceError: the disk is full, the folder cannot be written, or the shard's place elsewhere cannot be reached.
    """
    name = shard_name(shard.span.index)
    with staged(shard.folder / name) as temporary:
        write_arrays(temporary, {"norm": shard.norm})
        crc = write_shard_file(
            temporary,
            ACTIVATIONS_NAME,
            shard.activations,
            shape=shard.chunk,
            compression=shard.compression,
            dtype=shard.dtype,
            mark=shard_mark(shard.cache, shard.hook_point, shard.span.index),
        )
    record = ShardRecord(
        cache=shard.cache,
        hook_point=shard.hook_point,
        span=shard.span,
        d_in=shard.d_in,
        dtype=shard.dtype,
        compression=shard.compression,
        chunk=shard.chunk,
        files=record_files(shard.folder, name, known={shard_file(shard.span.index): crc}),
    )
    write_record(shard.folder / record_name(shard.span.index), record)
    if shard.remote is not None:
        shard.remote.publish(shard.folder, record_name(shard.span.index), record)
        (shard.folder / shard_file(shard.span.index)).unlink()
    return record


class ShardWriter:
    """Writes shards in threads, so that hashing and flushing overlap with the model's forward.

    At most one group of shards (one a hook point) is in the making while the next one is being filled.
    """

    def __init__(self, num_hook_points: int) -> None:
        """Starts no thread yet."""
        self._pool = ThreadPoolExecutor(min(num_hook_points, _MAX_WORKERS), thread_name_prefix="saekit-write")
        self._running: list[Future[ShardRecord]] = []

    def submit(self, shards: Sequence[Shard]) -> None:
        """Hands over one group, after waiting for the group before.

        Raises:
            ResourceError: the group before could not be written.
        """
        self._wait()
        self._running = [self._pool.submit(write_shard, shard) for shard in shards]

    def _wait(self) -> None:
        running, self._running = self._running, []
        for future in running:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an error elsewhere, shards in the making are finished: a rerun need not compute them again.
        self._pool.shutdown(wait=True)
        if error is None:
            self._wait()
