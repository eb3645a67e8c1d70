"""Documents from files or from a `datasets` reference, in an order that is the same in every run."""

import contextlib
import importlib.util
import json
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

import numpy as np
from pydantic import Field

from saekit.config import Config, config_sha256
from saekit.errors import DataError, MissingDependencyError, ResourceError
from saekit.manifest import file_sha256
from saekit.models.records import (
    KNOWN_FORMATS,
    Record,
    checked_record,
    file_format,
    file_records,
    line_record,
    opened,
    reason,
)

__all__ = ["Document", "FileTextConfig", "HubTextConfig", "TextConfig", "iter_documents", "text_fingerprint"]


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
    shuffle_seed: int | None = Field(default=None, ge=0)
    """Order of the documents: None keeps the files' own. Shuffling holds 20 bytes a document in memory, and a
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
        DataError: nothing at the path or reference, no document in it, invalid UTF-8, a broken record, or a column that is missing or no text.
        ResourceError: no room for the temporary copy that shuffling makes of some forms.
        MissingDependencyError: a `datasets` reference without the extra `datasets`.
    """
    if isinstance(text, HubTextConfig):
        records = _hub_records(text)
    elif text.shuffle_seed is None:
        records = (record for path in _files(text) for record in file_records(path, text.column))
    else:
        records = _shuffled_records(text, text.shuffle_seed)
    index = -1
    for index, record in enumerate(records):
        yield Document(index, record.text, record.source, record.title)
    if index < 0:
        place = f"dataset {text.name!r}" if isinstance(text, HubTextConfig) else ", ".join(map(repr, text.paths))
        raise DataError(f"text {place}: no documents, needs at least one")


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
    contents = [(file_sha256(path), file_format(path)) for path in _files(text)]
    return config_sha256({"files": contents, "column": text.column, "shuffle_seed": text.shuffle_seed})


def _files(text: FileTextConfig) -> list[Path]:
    """Returns the files that `paths` stand for, each once."""
    files: dict[Path, None] = {}
    for entry in text.paths:
        path = Path(entry).expanduser()
        if path.is_file():
            if file_format(path) is None:
                raise DataError(f"text file {entry!r}: unknown kind, needs {KNOWN_FORMATS}")
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and file_format(p) is not None)
        else:
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
            has_magic = any(character in pattern for character in "*?[")
            matches = anchor.glob(pattern) if has_magic else ()
            found = sorted(p for p in matches if p.is_file() and file_format(p) is not None)
            if not has_magic:
                raise DataError(f"text file {entry!r}: no such file or folder")
        if not found:
            raise DataError(f"text files {entry!r}: no file matches, needs {KNOWN_FORMATS}")
        files.update(dict.fromkeys(found))
    return list(files)


def _shuffled_records(text: FileTextConfig, seed: int) -> Iterator[Record]:
    """Yields all records in random order, from places in files instead of texts in memory."""
    files = _files(text)
    file_ids, offsets, numbers = array("i"), array("q"), array("q")
    with contextlib.ExitStack() as stack:
        lines: list[IO[bytes]] = []
        for file_id, path in enumerate(files):
            lines.append(stack.enter_context(_lines(path, text.column)))
            offset = 0
            for number, line in enumerate(lines[file_id], start=1):
                if line.strip():
                    file_ids.append(file_id)
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
        for place in np.random.default_rng(seed).permutation(len(offsets)):
            file_id = file_ids[place]
            lines[file_id].seek(offsets[place])
            line = lines[file_id].readline()
            if _is_plain_jsonl(files[file_id]):
                yield line_record(line, f"{files[file_id]}:{numbers[place]}", text.column)
            else:
                yield Record(*json.loads(line))


def _is_plain_jsonl(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


@contextlib.contextmanager
def _lines(path: Path, column: str) -> Iterator[IO[bytes]]:
    """Yields a seekable file of one record a line: the file itself, or a temporary one that is spooled from it."""
    if _is_plain_jsonl(path):
        with opened(path) as file:
            yield file
        return
    with tempfile.TemporaryFile(prefix="saekit-texts-") as spool:
        try:
            for record in file_records(path, column):
                spool.write(json.dumps([record.text, record.source, record.title]).encode() + b"\n")
            spool.seek(0)
        except OSError as error:
            raise ResourceError(
                f"{tempfile.gettempdir()!r}: no room for a plain copy of {str(path)!r} ({reason(error)});"
                " point TMPDIR elsewhere, or shuffle plain .jsonl files, which need no copy"
            ) from error
        yield spool


def _hub_records(text: HubTextConfig) -> Iterator[Record]:
    where = f"dataset {text.name!r}"
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependencyError(f"{where}: needs a package that is not installed; pip install 'saekit[datasets]'")
    import datasets

    try:
        rows = datasets.load_dataset(
            text.name, text.config_name, split=text.split, revision=text.revision, streaming=text.streaming
        )
        names = rows.column_names
        if names is not None and text.column not in names:
            raise DataError(f"{where}: no column {text.column!r}; its columns: {', '.join(map(repr, names))}")
        for number, record in enumerate(rows):
            yield checked_record(record, f"{text.name}[{text.split}]:{number}", text.column)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{where}: cannot be loaded: {reason(error)}; check name, split, config_name, files and network"
        ) from error
