"""Documents from files or from a `datasets` reference, in an order that is the same in every run."""

import contextlib
import importlib.util
import io
import json
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
from pydantic import Field

from saekit.config import Config, config_sha256
from saekit.errors import DataError, MissingDependencyError
from saekit.manifest import file_sha256

__all__ = ["Document", "FileTextConfig", "HubTextConfig", "TextConfig", "iter_documents", "text_fingerprint"]

_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_COMPRESSIONS = (".zst", ".gz")
_KNOWN = ", ".join(_FORMATS) + ", each but .parquet also as .zst or .gz"


class HubTextConfig(Config):
    """A dataset that the `datasets` library can load: a hub id, or a local folder."""

    kind: Literal["huggingface"] = "huggingface"
    """Chooses this source of text."""
    name: str
    """Hub id such as `monology/pile-uncopyrighted`, or a local dataset folder."""
    config_name: str | None = None
    """The dataset's own configuration (subset), where it has several."""
    split: str = "train"
    """Which split, in the library's slice syntax where streaming is off."""
    column: str = "text"
    """The column that holds the text."""
    revision: str | None = None
    """Commit, tag or branch. Pin a commit where the exact texts matter: the fingerprint holds this value as written."""
    streaming: bool = True
    """Read on the fly instead of downloading the whole dataset first."""


class FileTextConfig(Config):
    """Local files."""

    kind: Literal["files"] = "files"
    """Chooses this source of text."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (searched below) or glob patterns: .txt (one document a file), .jsonl and .json (one a record) and
    .parquet (one a row); all but .parquet also as .zst or .gz. Read in this order, names within an entry sorted."""
    column: str = "text"
    """The field or column that holds the text of .jsonl, .json and .parquet."""
    shuffle_seed: int | None = None
    """Order of the documents: None keeps the files' own. Shuffling holds one number a document in memory, and a
    temporary plain copy of the texts of compressed, .json and .parquet files."""


TextConfig = Annotated[HubTextConfig | FileTextConfig, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    index: int
    """Place in the order of reading, from 0."""
    text: str
    """May be empty."""
    source: str
    """File and line or row, or dataset, split and row."""
    title: str = ""
    """The record's own `title` where it has one."""


def iter_documents(text: HubTextConfig | FileTextConfig) -> Iterator[Document]:
    """Yields every document, empty ones included, in an order that depends on `text` alone.

    Raises:
        DataError: nothing at the path or reference, invalid UTF-8, a broken record, or a column that is missing or no text.
        MissingDependencyError: a `datasets` reference without the extra `datasets`.
    """
    if isinstance(text, HubTextConfig):
        records = _hub_records(text)
    elif text.shuffle_seed is None:
        records = (record for path in _files(text) for record in _file_records(path, text.column))
    else:
        records = _shuffled_records(text, text.shuffle_seed)
    for index, record in enumerate(records):
        yield Document(index, record.text, record.source, record.title)


def text_fingerprint(text: HubTextConfig | FileTextConfig) -> str:
    """Returns the identity of the documents and their order, 64 hex digits.

    Local files count by content (every byte is read), column and seed, wherever they lie; a hub dataset by its config as
    written, so that only a pinned revision pins the texts.

    Raises:
        DataError: no file matches.
    """
    if isinstance(text, HubTextConfig):
        values = text.to_dict()
        del values["streaming"]
        folder = Path(text.name)
        if folder.is_dir():
            del values["name"]
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            values["files"] = [(str(path.relative_to(folder)), file_sha256(path)) for path in files]
        return config_sha256(values)
    contents = [(file_sha256(path), _format(path)) for path in _files(text)]
    return config_sha256({"files": contents, "column": text.column, "shuffle_seed": text.shuffle_seed})


@dataclass(frozen=True, slots=True)
class _Record:
    text: str
    source: str
    title: str = ""


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS[:-1] else None
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _files(text: FileTextConfig) -> list[Path]:
    """Returns the files that `paths` stand for, each once."""
    files: dict[Path, None] = {}
    for entry in text.paths:
        path = Path(entry).expanduser()
        if path.is_file():
            if _format(path) is None:
                raise DataError(f"text file {entry!r}: unknown kind, needs {_KNOWN}")
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _format(p) is not None)
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
            has_magic = any(character in pattern for character in "*?[")
            matches = anchor.glob(pattern) if has_magic else ()
            found = sorted(p for p in matches if p.is_file() and _format(p) is not None)
            if not has_magic:
                raise DataError(f"text file {entry!r}: no such file or folder")
        if not found:
            raise DataError(f"text files {entry!r}: no file matches, needs {_KNOWN}")
        files.update(dict.fromkeys(found))
    return list(files)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Yields the plain bytes of a file that may be compressed."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".zst":
            import zstandard

            # Concatenated frames are how large corpora are written in parallel.
            with (
                path.open("rb") as file,
                zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as reader,
            ):
                yield io.BufferedReader(reader, 1 << 20)
        elif suffix == ".gz":
            import gzip

            with gzip.open(path, "rb") as unpacked:
                yield io.BufferedReader(unpacked, 1 << 20)
        else:
            with path.open("rb") as file:
                yield file
    except (OSError, EOFError) as error:
        raise DataError(f"text file {str(path)!r}: cannot be read: {_reason(error)}") from error
    except Exception as error:
        # zstandard's and zlib's errors are types of their own; anything else keeps its own type.
        if type(error).__module__.split(".")[0] not in ("zstandard", "zlib", "backend_c"):
            raise
        raise DataError(f"text file {str(path)!r}: broken compression: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _file_records(path: Path, column: str) -> Iterator[_Record]:
    kind = _format(path)
    if kind == ".parquet":
        yield from _parquet_records(path, column)
        return
    with _opened(path) as file:
        if kind == ".txt":
            yield _Record(_decoded(file.read(), str(path)), str(path), path.name.split(".")[0])
        elif kind == ".json":
            yield from _json_records(_decoded(file.read(), str(path)), str(path), column)
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _line_record(line, f"{path}:{number}", column)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        at = f"byte {error.start} (line {line})" if line > 1 else f"byte {error.start}"
        raise DataError(f"{where}: invalid UTF-8 at {at}, needs UTF-8 text") from error


def _line_record(line: bytes, where: str, column: str) -> _Record:
    decoded = _decoded(line, where)
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    return _checked(record, where, column)


def _json_records(data: str, where: str, column: str) -> Iterator[_Record]:
    try:
        records = json.loads(data)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(records, list):
        raise DataError(f"{where}: found a JSON {type(records).__name__}, needs a list of records")
    for number, record in enumerate(records):
        yield _checked(record, f"{where}[{number}]", column)


def _checked(record: object, where: str, column: str) -> _Record:
    """Returns the text of one record; null counts as empty."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: found {type(record).__name__}, needs a record with the column {column!r}")
    if column not in record:
        columns = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no column {column!r}; its columns: {columns}")
    text = record[column]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{where}: column {column!r} holds {type(text).__name__}, needs text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: half a surrogate pair at character {error.start}, needs valid Unicode"
            ) from error
    title = record.get("title")
    return _Record(text, where, title if isinstance(title, str) else "")


def _parquet_records(path: Path, column: str) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"text file {str(path)!r}: no column {column!r}; its columns: {', '.join(map(repr, names))}"
                )
            kept = [column, "title"] if "title" in names and column != "title" else [column]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=kept):
                for record in batch.to_pylist():
                    yield _checked(record, f"{path}:{number}", column)
                    number += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"text file {str(path)!r}: not a readable parquet file: {_reason(error)}") from error


def _shuffled_records(text: FileTextConfig, seed: int) -> Iterator[_Record]:
    """Yields all records in random order, from byte offsets instead of texts in memory."""
    files = _files(text)
    file_ids, offsets = array("i"), array("q")
    with contextlib.ExitStack() as stack:
        plain: list[IO[bytes]] = []
        for number, path in enumerate(files):
            file = stack.enter_context(_lines(path, text.column))
            plain.append(file)
            offset = 0
            for line in file:
                if line.strip():
                    file_ids.append(number)
                    offsets.append(offset)
                offset += len(line)
        for place in np.random.default_rng(seed).permutation(len(offsets)):
            file_id = file_ids[place]
            file = plain[file_id]
            file.seek(offsets[place])
            line = file.readline()
            path = files[file_id]
            if _is_plain_jsonl(path):
                yield _line_record(line, f"{path} at byte {offsets[place]}", text.column)
            else:
                yield _Record(*json.loads(line))


def _is_plain_jsonl(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


@contextlib.contextmanager
def _lines(path: Path, column: str) -> Iterator[IO[bytes]]:
    """Yields a seekable file of one record a line: the file itself, or a temporary one that is spooled from it."""
    if _is_plain_jsonl(path):
        with _opened(path) as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="saekit-texts-") as spool:
        for record in _file_records(path, column):
            spool.write(json.dumps([record.text, record.source, record.title]).encode() + b"\n")
        spool.seek(0)
        yield spool


def _hub_records(text: HubTextConfig) -> Iterator[_Record]:
    where = f"dataset {text.name!r}"
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependencyError(f"{where}: needs a package that is not installed; pip install 'saekit[datasets]'")
    import datasets

    try:
        rows = datasets.load_dataset(
            text.name, text.config_name, split=text.split, revision=text.revision, streaming=text.streaming
        )
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{where}: cannot be loaded: {_reason(error)}; check name, split, config_name and network"
        ) from error
    names = rows.column_names
    if names is not None and text.column not in names:
        raise DataError(f"{where}: no column {text.column!r}; its columns: {', '.join(map(repr, names))}")
    for number, record in enumerate(rows):
        yield _checked(record, f"{text.name}[{text.split}]:{number}", text.column)
