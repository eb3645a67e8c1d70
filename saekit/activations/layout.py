"""What lies where in a cache folder, and the records that declare a part of it whole.

    manifest.json               stage, config, inputs, counts (saekit.manifest)
    tokens.zarr                 group: token, document [R, T] int32, kind [R, T] uint8, document_key [num_documents] uint64
    tokens.json                 PartRecord of the above and of documents.jsonl
    documents.jsonl             one line a document: index, source, title, start, sha256, num_tokens
    hooks/<hook point>/
        shard-00000.zarr        group: activations [rows, T, W] in one shard file, norm [rows, T] float32
        shard-00000.json        ShardRecord: written last, so a shard without it does not exist
        kinds.zarr              group: kind [R, T] uint8 with massive activations told, norm [R, T] float32
        statistics.json         Statistics over normal tokens
        index.json              HookIndex: all of the above with sizes and checksums

R rows of T tokens; a token's flat index is `row * T + position`. W is D, or D + 4 bytes of a quantised activation
(saekit.activations.codec).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import google_crc32c
import numpy as np
from pydantic import Field, ValidationError

from saekit.activations.chunks import ChunkShape
from saekit.activations.codec import StoredDtype
from saekit.activations.shardfile import Compression
from saekit.config import Config
from saekit.errors import ResourceError, StoreError
from saekit.manifest import Manifest, write_json

__all__ = [
    "ACTIVATIONS_NAME",
    "DOCUMENTS_NAME",
    "INDEX_NAME",
    "KINDS_NAME",
    "STATISTICS_NAME",
    "TOKENS_NAME",
    "TOKENS_RECORD_NAME",
    "FileRecord",
    "Files",
    "HookIndex",
    "LocalFiles",
    "PartRecord",
    "ShardRecord",
    "ShardSpan",
    "file_problems",
    "hook_folder",
    "hook_points_of",
    "read_record",
    "record_files",
    "record_name",
    "refuse_earlier",
    "shard_file",
    "shard_name",
    "shard_spans",
    "write_record",
]

TOKENS_NAME = "tokens.zarr"
TOKENS_RECORD_NAME = "tokens.json"
DOCUMENTS_NAME = "documents.jsonl"
KINDS_NAME = "kinds.zarr"
STATISTICS_NAME = "statistics.json"
INDEX_NAME = "index.json"
ACTIVATIONS_NAME = "activations"

_BLOCK_BYTES = 2**20


class FileRecord(Config):
    """One file as it was written."""

    size_bytes: int
    """Length."""
    crc32c: str
    """Of its bytes, eight hexadecimal digits."""


class PartRecord(Config):
    """Declares a group of files whole."""

    cache: str
    """Identity of the cache that they belong to: hash of its config and inputs."""
    files: dict[str, FileRecord]
    """Path relative to the record's folder -> what must be there."""
    counts: dict[str, int] = Field(default_factory=dict)
    """What the part holds."""


class ShardSpan(Config):
    """Which rows a shard holds."""

    index: int
    """Place among the shards, from 0."""
    first_row: int
    """Row of the whole cache that its first row is."""
    num_rows: int
    """How many."""


class ShardRecord(PartRecord):
    """Declares one shard of one hook point whole."""

    hook_point: str
    """Where the activations were taken."""
    span: ShardSpan
    """Which rows."""
    d_in: int
    """Width of an activation."""
    dtype: StoredDtype
    """Of the stored activations."""
    compression: Compression
    """Of their chunks."""
    chunk: ChunkShape
    """Rows and positions that a chunk holds."""


class HookIndex(PartRecord):
    """All shards of one hook point; `files` are its kinds and statistics."""

    hook_point: str
    """Where the activations were taken."""
    d_in: int
    """Width of an activation."""
    dtype: StoredDtype
    """Of the stored activations."""
    shards: tuple[ShardRecord, ...]
    """In order of rows."""


AnyRecord = TypeVar("AnyRecord", bound=PartRecord)


def hook_folder(cache: Path, hook_point: str) -> Path:
    """Returns the folder of a hook point; `:` becomes `@`, since archives and some file systems refuse a colon."""
    return cache / "hooks" / hook_point.replace(":", "@")


def hook_points_of(manifest: Manifest) -> list[str]:
    """Returns the hook points that a cache's config names."""
    names = manifest.config.get("hook_points")
    assert isinstance(names, list | tuple), "a cache's config names its hook points"
    return [str(name) for name in names]


def shard_name(index: int) -> str:
    """Returns a shard's folder name."""
    return f"shard-{index:05d}.zarr"


def shard_file(index: int) -> str:
    """Returns the path of the file that holds a shard's activations, relative to the hook point's folder."""
    return f"{shard_name(index)}/{ACTIVATIONS_NAME}/c/0/0/0"


def record_name(index: int) -> str:
    """Returns the name of a shard's record."""
    return f"shard-{index:05d}.json"


def shard_spans(num_rows: int, shard_rows: int) -> list[ShardSpan]:
    """Returns the shards of a cache of `num_rows` rows; the last one may be shorter."""
    starts = range(0, num_rows, shard_rows)
    return [
        ShardSpan(index=index, first_row=first, num_rows=min(shard_rows, num_rows - first))
        for index, first in enumerate(starts)
    ]


def _files_below(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file())
    else:
        yield path


def _file_crc32c(path: Path) -> str:
    crc, block = 0, np.empty(_BLOCK_BYTES, np.uint8)
    with path.open("rb", buffering=0) as file:
        while found := file.readinto(block):  # type: ignore[arg-type]  # an array is a buffer
            crc = google_crc32c.extend(crc, block[:found])
    return f"{crc:08x}"


def record_files(folder: Path, *names: str, known: Mapping[str, str] | None = None) -> dict[str, FileRecord]:
    """Returns size and checksum of every file at or below `folder / name`.

    Args:
        known: checksums of files whose bytes need not be read again, by path relative to `folder`.
    """
    known = known or {}
    records = {}
    for name in names:
        for file in _files_below(folder / name):
            relative = file.relative_to(folder).as_posix()
            crc = known[relative] if relative in known else _file_crc32c(file)
            records[relative] = FileRecord(size_bytes=file.stat().st_size, crc32c=crc)
    return records


class Files(Protocol):
    """The files of a cache, by the paths that they have or would have on this machine."""

    def size(self, path: Path) -> int:
        """Returns the length of a file; FileNotFoundError where it is not there."""

    def crc32c(self, path: Path) -> str:
        """Returns the checksum of a file, eight hexadecimal digits."""

    def shards(self, folder: Path) -> list[str]:
        """Returns the names of the shards in a hook point's folder."""

    def below(self, path: Path) -> list[Path]:
        """Returns all files below a folder."""

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""


class LocalFiles:
    """Those on this machine."""

    def size(self, path: Path) -> int:
        """Returns the length of a file."""
        return path.stat().st_size

    def crc32c(self, path: Path) -> str:
        """Returns the checksum of a file."""
        return _file_crc32c(path)

    def shards(self, folder: Path) -> list[str]:
        """Returns the names of the shards in a hook point's folder."""
        return sorted(entry.name for entry in folder.glob("shard-*.zarr"))

    def below(self, path: Path) -> list[Path]:
        """Returns all files below a folder."""
        return sorted(file for file in path.rglob("*") if file.is_file())

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""
        path.unlink(missing_ok=True)


_LOCAL = LocalFiles()


def file_problems(folder: Path, record: PartRecord, *, verify: bool, files: Files = _LOCAL) -> list[str]:
    """Returns one phrase for each file that is not as recorded.

    Args:
        verify: read every byte and compare checksums; else only presence and length.
        files: where they are.

    Raises:
        ResourceError: files elsewhere cannot be reached.
    """
    problems = []
    for name, expected in record.files.items():
        path = folder / name
        try:
            size = files.size(path)
            if size != expected.size_bytes:
                problems.append(f"{name} has {size:,} bytes, needs {expected.size_bytes:,}")
            elif verify and files.crc32c(path) != expected.crc32c:
                problems.append(f"{name} has changed since it was written (crc32c differs)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except ResourceError:
            raise
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
    return problems


def write_record(path: Path, record: PartRecord) -> None:
    """Writes a record atomically; this is the moment its part comes into being."""
    write_json(path, record.to_dict())


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """Returns a record, or None where there is none.

    Raises:
        StoreError: the file is there but does not hold one.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        raise StoreError(f"{str(path)!r}: not a record of a cache, needs the file as this version writes it") from error


def refuse_earlier(cache: Path) -> None:
    """Refuses a cache that an earlier version has made, finished or not.

    Raises:
        StoreError: it is one.
    """
    path = cache / TOKENS_RECORD_NAME
    # Those versions kept a sha256 of each file.
    if path.is_file() and b'"sha256"' in path.read_bytes():
        raise StoreError(
            f"cache {str(cache)!r}: made by an earlier version of saekit, whose files this one does not read; remove the folder or"
            " choose another, and cache anew"
        )
