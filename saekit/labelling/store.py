"""Labels and scores on disk: one JSON line each, appended whole, so that a killed run loses at most the line it was writing."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from saekit.config import Config
from saekit.errors import ResourceError, StoreError
from saekit.labelling.records import Label, Score
from saekit.manifest import atomic_write

__all__ = ["LABELS_NAME", "SCORES_NAME", "RecordFile", "read_labels", "read_scores"]

LABELS_NAME = "labels.jsonl"
SCORES_NAME = "scores.jsonl"

RecordT = TypeVar("RecordT", bound=Config)


class RecordFile(Generic[RecordT]):
    """An append-only file of records.

    Attributes:
        records: what the file holds, in order.
    """

    def __init__(self, path: str | Path, record_type: type[RecordT]) -> None:
        """Reads the file, if there is one, and cuts off a last line that was not written to its end.

        Raises:
            StoreError: a whole line is no such record.
            ResourceError: the file cannot be read or cut.
        """
        self.path = Path(path)
        self.records, whole_bytes = _read(self.path, record_type)
        try:
            if self.path.exists() and self.path.stat().st_size > whole_bytes:
                os.truncate(self.path, whole_bytes)
        except OSError as error:
            raise ResourceError(f"{str(path)!r}: cannot be repaired: {error.strerror or error}") from error

    def extend(self, records: Iterable[RecordT]) -> None:
        """Appends records in one write and waits until the disk has them.

        Raises:
            ResourceError: the disk is full or the file cannot be written.
        """
        new = list(records)
        if not new:
            return
        data = _lines(new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"{str(self.path)!r}: cannot be written: {error.strerror or error}") from error
        self.records.extend(new)

    def remove(self, is_unwanted: Callable[[RecordT], bool]) -> int:
        """Takes records out of the file, atomically; returns how many.

        Raises:
            ResourceError: the file cannot be written.
        """
        kept = [record for record in self.records if not is_unwanted(record)]
        num_removed = len(self.records) - len(kept)
        if num_removed:
            with atomic_write(self.path) as file:
                file.write(_lines(kept))
            self.records[:] = kept
        return num_removed


def _lines(records: Iterable[Config]) -> bytes:
    return "".join(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records).encode()


def _read(path: Path, record_type: type[RecordT]) -> tuple[list[RecordT], int]:
    """Returns the records and the number of bytes that hold them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise ResourceError(f"{str(path)!r}: cannot be read: {error.strerror or error}") from error
    # Only a line with its line break was written to the end.
    whole = data[: data.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(record_type.model_validate_json(line))
        except ValidationError as error:
            raise StoreError(
                f"{str(path)!r}: line {number} is no {record_type.__name__.lower()}; remove the file to write it anew"
            ) from error
    return records, len(whole)


def read_labels(folder: str | Path) -> list[Label]:
    """Returns all labels of a label folder, also of an unfinished one; none where there is no file.

    Raises:
        StoreError: a line is no label.
    """
    return _read(Path(folder) / LABELS_NAME, Label)[0]


def read_scores(folder: str | Path) -> list[Score]:
    """Returns all scores of a label folder, also of an unfinished one; none where there is no file.

    Raises:
        StoreError: a line is no score.
    """
    return _read(Path(folder) / SCORES_NAME, Score)[0]
