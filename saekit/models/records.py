"""The records in one local file, whatever its form: plain or compressed text, JSON, or parquet."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from saekit.errors import DataError

__all__ = [
    "KNOWN_FORMATS",
    "Record",
    "checked_record",
    "file_format",
    "file_records",
    "line_record",
    "opened",
    "reason",
]

_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
KNOWN_FORMATS = ", ".join(_FORMATS) + ", each but .parquet also as .zst or .gz"
"""For messages."""


@dataclass(frozen=True, slots=True)
class Record:
    """A text, where it lies, and its title if it has one."""

    text: str
    source: str
    title: str = ""


def file_format(path: Path) -> str | None:
    """Returns the suffix that tells a file's form (that of its content, if it is compressed); None for unknown ones."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS[:-1] else None
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Yields the plain bytes of a file that may be compressed.

    Raises:
        DataError: it cannot be read, or its compressed stream is broken or ends too early.
    """
    compression = _COMPRESSIONS.get(path.suffix.lower())
    try:
        if compression is None:
            with path.open("rb") as file:
                yield file
        else:
            import pyarrow as pa

            # pyarrow's reader, because zstandard's (0.25) takes a truncated stream for its end.
            with io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20) as unpacked:
                yield unpacked
    except OSError as error:
        raise DataError(f"text file {str(path)!r}: cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def file_records(path: Path, column: str) -> Iterator[Record]:
    """Yields the records of one file in order.

    Raises:
        DataError: see `iter_documents`; the message names file and line or row.
    """
    kind = file_format(path)
    if kind == ".parquet":
        yield from _parquet_records(path, column)
        return
    with opened(path) as file:
        if kind == ".txt":
            yield Record(_decoded(file.read(), str(path)), str(path), path.name.split(".")[0])
        elif kind == ".json":
            yield from _json_records(_decoded(file.read(), str(path)), str(path), column)
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield line_record(line, f"{path}:{number}", column)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        at = f"byte {error.start} (line {line})" if line > 1 else f"byte {error.start}"
        raise DataError(f"{where}: invalid UTF-8 at {at}, needs UTF-8 text") from error


def line_record(line: bytes, where: str, column: str) -> Record:
    """Returns the record on one line of JSON.

    Raises:
        DataError: invalid UTF-8 or JSON, no such column, or no text in it.
    """
    decoded = _decoded(line, where)
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    return checked_record(record, where, column)


def _json_records(data: str, where: str, column: str) -> Iterator[Record]:
    try:
        records = json.loads(data)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(records, list):
        raise DataError(f"{where}: found a JSON {type(records).__name__}, needs a list of records")
    for number, record in enumerate(records):
        yield checked_record(record, f"{where}[{number}]", column)


def _parquet_records(path: Path, column: str) -> Iterator[Record]:
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
                    yield checked_record(record, f"{path}:{number}", column)
                    number += 1
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"text file {str(path)!r}: not a readable parquet file: {reason(error)}") from error


def checked_record(record: object, where: str, column: str) -> Record:
    """Returns the text of one record; null counts as empty.

    Raises:
        DataError: no such column, or no text in it.
    """
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
    return Record(text, where, title if isinstance(title, str) else "")
