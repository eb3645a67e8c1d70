"""The token rows of a cache and the documents they come from, written once before any activation."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from saekit.activations.codec import AnyArray
from saekit.activations.layout import (
    DOCUMENTS_NAME,
    TOKENS_NAME,
    TOKENS_RECORD_NAME,
    PartRecord,
    file_problems,
    read_record,
    record_files,
    write_record,
)
from saekit.activations.stored import read_arrays, write_arrays
from saekit.activations.writer import staged
from saekit.errors import StoreError
from saekit.manifest import atomic_write
from saekit.models.texts import Document
from saekit.models.tokens import TokenRow

__all__ = ["MASSIVE", "NORMAL", "PADDING", "SPECIAL", "TokenTable", "kinds_of", "read_token_table", "write_token_table"]

NORMAL, PADDING, SPECIAL, MASSIVE = 0, 1, 2, 3
"""Kinds of token. MASSIVE is told per hook point, from the norms there."""

_START_CHARS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTable:
    """The rows of a cache in memory."""

    tokens: npt.NDArray[np.int32]
    """`[R, T]` token ids."""
    documents: npt.NDArray[np.int32]
    """`[R, T]` document of each token, -1 for padding."""
    kinds: npt.NDArray[np.uint8]
    """`[R, T]` NORMAL, PADDING or SPECIAL."""
    document_keys: npt.NDArray[np.uint64]
    """`[num_documents]` first 8 bytes of the sha256 of each document's text."""

    @property
    def context_len(self) -> int:
        """Positions of a row."""
        return int(self.tokens.shape[1])

    @property
    def num_rows(self) -> int:
        """Rows."""
        return int(self.tokens.shape[0])


def kinds_of(row: TokenRow) -> npt.NDArray[np.uint8]:
    """Returns `[T]` NORMAL, PADDING or SPECIAL."""
    return np.where(row.document < 0, PADDING, np.where(row.special, SPECIAL, NORMAL)).astype(np.uint8)


class _DocumentLog:
    """Writes one line for each document that passes, as soon as no further row can hold its tokens."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._pending: dict[int, dict[str, object]] = {}
        self._num_tokens: dict[int, int] = {}
        self.keys: list[int] = []

    def watch(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            digest = hashlib.sha256(document.text.encode())
            self._pending[document.index] = {
                "index": document.index,
                "source": document.source,
                "title": document.title,
                "start": document.text[:_START_CHARS],
                "sha256": digest.hexdigest(),
            }
            yield document

    def count(self, row: TokenRow) -> None:
        ids, counts = np.unique(row.document[row.document >= 0], return_counts=True)
        for index, count in zip(ids.tolist(), counts.tolist(), strict=True):
            self._num_tokens[index] = self._num_tokens.get(index, 0) + count
        self._flush(before=int(ids[-1]))

    def finish(self) -> None:
        """Writes what is left of the documents in the rows; tokenisers read ahead, so later ones may be pending."""
        self._flush(before=max(self._num_tokens, default=-1) + 1)

    def _flush(self, *, before: int) -> None:
        while self._pending and (index := next(iter(self._pending))) < before:
            record = self._pending.pop(index) | {"num_tokens": self._num_tokens.pop(index, 0)}
            self.keys.append(int(str(record["sha256"])[:16], 16))
            self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")


def write_token_table(
    folder: Path,
    documents: Iterator[Document],
    rows_of: Callable[[Iterator[Document]], Iterator[TokenRow]],
    *,
    cache: str,
    num_rows: int,
    context_len: int,
) -> TokenTable:
    """Draws at most `num_rows` rows and writes them, with one line for each document in them.

    Args:
        rows_of: documents -> token rows.
        cache: identity of the cache.

    Raises:
        DataError: as the documents and the tokeniser say.
        ResourceError: the disk is full, or the folder cannot be written.
    """
    tokens = np.empty((num_rows, context_len), np.int32)
    owners, kinds = np.empty_like(tokens), np.empty((num_rows, context_len), np.uint8)
    filled = 0
    with atomic_write(folder / DOCUMENTS_NAME) as file:
        log = _DocumentLog(file)
        for filled, row in enumerate(itertools.islice(rows_of(log.watch(documents)), num_rows), start=1):
            tokens[filled - 1], owners[filled - 1] = row.tokens, row.document
            kinds[filled - 1] = kinds_of(row)
            log.count(row)
        log.finish()
    table = TokenTable(
        tokens=tokens[:filled],
        documents=owners[:filled],
        kinds=kinds[:filled],
        document_keys=np.array(log.keys, np.uint64),
    )
    with staged(folder / TOKENS_NAME) as temporary:
        arrays: dict[str, AnyArray] = {
            "token": table.tokens,
            "document": table.documents,
            "kind": table.kinds,
            "document_key": table.document_keys,
        }
        write_arrays(temporary, arrays)
    counts = {"rows": filled, "context_len": context_len, "documents": len(log.keys)}
    files = record_files(folder, TOKENS_NAME, DOCUMENTS_NAME)
    write_record(folder / TOKENS_RECORD_NAME, PartRecord(cache=cache, files=files, counts=counts))
    return table


def read_token_table(folder: Path, *, cache: str) -> TokenTable | None:
    """Returns the rows of a cache, or None where they have not been written (whole).

    Raises:
        StoreError: they cannot be read.
    """
    record = read_record(folder / TOKENS_RECORD_NAME, PartRecord)
    if record is None or record.cache != cache or file_problems(folder, record, verify=True):
        return None
    tokens, documents, kinds, keys = read_arrays(folder / TOKENS_NAME, "token", "document", "kind", "document_key")
    if tokens.shape != (record.counts["rows"], record.counts["context_len"]):
        raise StoreError(f"{str(folder / TOKENS_NAME)!r}: rows of shape {tokens.shape}, its record says otherwise")
    return TokenTable(
        tokens=tokens.astype(np.int32, copy=False),
        documents=documents.astype(np.int32, copy=False),
        kinds=kinds.astype(np.uint8, copy=False),
        document_keys=keys.astype(np.uint64, copy=False),
    )
