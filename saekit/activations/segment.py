"""One segment of a ring: made by the processes that fill it, opened by those that train on it."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from saekit.activations.collect import Collector
from saekit.activations.joined import JoinedStore
from saekit.activations.layout import (
    TOKENS_NAME,
    TOKENS_RECORD_NAME,
    HookIndex,
    PartRecord,
    ShardRecord,
    file_problems,
    hook_folder,
    read_record,
    record_files,
    shard_spans,
    write_record,
)
from saekit.activations.reader import ShardReader
from saekit.activations.ring import LEDGER_NAME, Ledger, LedgerEntry, Place, Ring, SegmentRecord
from saekit.activations.rows import MASSIVE, NORMAL, TokenTable
from saekit.activations.store import ActivationStore
from saekit.activations.stored import read_arrays, read_norms, write_arrays
from saekit.activations.view import StoreView
from saekit.activations.walk import TextWalk
from saekit.activations.writer import remove_leftovers, staged
from saekit.activations.writers import Writers
from saekit.errors import StoreError
from saekit.manifest import write_json
from saekit.progress import NO_PROGRESS

if TYPE_CHECKING:
    from saekit.models.load import LanguageModel

__all__ = ["begin_of", "make_segment", "open_segment", "read_ledger"]

_ARRAYS = ("token", "document", "kind")


def read_ledger(ring: Ring) -> Ledger:
    """Returns the ring's ledger, an empty one where there is none yet.

    Raises:
        StoreError: it cannot be read, or belongs to another ring.
    """
    path = ring.folder / LEDGER_NAME
    if not path.exists():
        return Ledger(ring=ring.identity)
    try:
        ledger = Ledger.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreError(f"{str(path)!r}: no ledger of a ring; remove the ring's folder to begin anew") from error
    if ledger.ring != ring.identity:
        raise StoreError(f"{str(path)!r}: of another ring, needs a folder of its own; remove it to begin anew")
    return ledger


def begin_of(ledger: Ledger, number: int) -> Place:
    """Returns where a segment begins whose predecessor is in the ledger."""
    return ledger.segments[number - 1].end if number else Place(0, 0)


def make_segment(
    ring: Ring, number: int, lm: "LanguageModel", walk: TextWalk, writers: Writers, thresholds: Mapping[str, float]
) -> LedgerEntry:
    """Makes what is missing of a segment, by all processes together; returns its line in the ledger, where it now stands.

    Args:
        ring: where.
        number: which one; all before it are in the ledger.
        lm: the model.
        walk: draws the rows; used by the first process alone.
        writers: the processes that fill the ring.
        thresholds: hook point -> norm above which a token is massive.

    Raises:
        SaekitError: as `cache_activations`.
    """
    folder, cache = ring.segment_folder(number), ring.segment_identity(number)
    place, end = writers.first(lambda: _prepare(ring, number, walk))
    table = _read_table(folder, cache)
    assert table is not None, "the first process has written it"
    spans = shard_spans(table.num_rows, ring.cache.shard_rows)
    collector = Collector(ring.cache, folder, lm, NO_PROGRESS, writers, cache=cache)
    collector.capture_shards(table, spans)
    writers.check(None)

    def commit() -> LedgerEntry:
        found = {name: [collector.shard_record(name, span) for span in spans] for name in ring.cache.hook_points}
        shards = {name: tuple(record for record in records if record is not None) for name, records in found.items()}
        assert all(len(records) == len(spans) for records in shards.values()), "every shard has been written or checked"
        mask = _training_mask(folder, shards, table, thresholds)
        entry = LedgerEntry(begin=place, end=end, num_rows=table.num_rows, num_tokens=int(mask.sum()))
        ledger = read_ledger(ring)
        # A segment that is made anew has its line already.
        entries = (*ledger.segments[:number], entry, *ledger.segments[number + 1 :])
        write_json(ring.folder / LEDGER_NAME, ledger.model_copy(update={"segments": entries}).to_dict())
        files = record_files(folder, TOKENS_NAME)
        write_record(ring.record_path(number), SegmentRecord(cache=cache, files=files, entry=entry, shards=shards))
        return entry

    return writers.first(commit)


def _prepare(ring: Ring, number: int, walk: TextWalk) -> tuple[Place, Place]:
    """Removes what a killed process left, writes the token rows where they are not there, and returns their places."""
    folder, cache = ring.segment_folder(number), ring.segment_identity(number)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, *(hook_folder(folder, name) for name in ring.cache.hook_points))
    record = read_record(folder / TOKENS_RECORD_NAME, PartRecord)
    if record is not None and _read_table(folder, cache) is not None:
        counts = record.counts
        return (
            Place(counts["begin_passes"], counts["begin_document"]),
            Place(counts["end_passes"], counts["end_document"]),
        )
    table, begin, end = walk.draw(begin_of(read_ledger(ring), number), ring.sizes.segment_rows)
    with staged(folder / TOKENS_NAME) as temporary:
        values = (table.tokens, table.documents, table.kinds)
        write_arrays(temporary, dict(zip(_ARRAYS, values, strict=True)))
    counts = {
        "rows": table.num_rows,
        "begin_passes": begin.passes,
        "begin_document": begin.document,
        "end_passes": end.passes,
        "end_document": end.document,
    }
    files = record_files(folder, TOKENS_NAME)
    write_record(folder / TOKENS_RECORD_NAME, PartRecord(cache=cache, files=files, counts=counts))
    return begin, end


def _read_table(folder: Path, cache: str) -> TokenTable | None:
    """Returns the rows of a segment, or None where they have not been written (whole)."""
    record = read_record(folder / TOKENS_RECORD_NAME, PartRecord)
    if record is None or record.cache != cache or file_problems(folder, record, verify=True):
        return None
    tokens, documents, kinds = read_arrays(folder / TOKENS_NAME, *_ARRAYS)
    return TokenTable(
        tokens=tokens.astype(np.int32, copy=False),
        documents=documents.astype(np.int32, copy=False),
        kinds=kinds.astype(np.uint8, copy=False),
        document_keys=np.empty(0, np.uint64),
    )


def _training_mask(
    folder: Path, shards: Mapping[str, Sequence[ShardRecord]], table: TokenTable, thresholds: Mapping[str, float]
) -> npt.NDArray[np.bool_]:
    """Returns `[R, T]` which tokens are trained on: those that are normal at all hook points, by the cache's thresholds."""
    mask: npt.NDArray[np.bool_] = table.kinds == NORMAL
    for name, records in shards.items():
        mask &= read_norms(hook_folder(folder, name), records) <= thresholds[name]
    return mask


class _SegmentStore(ActivationStore):
    """A segment's activations at one hook point; statistics are those of the cache that stays."""

    def __init__(self, folder: Path, record: SegmentRecord, table: TokenTable, kept: ActivationStore) -> None:
        """Reads no activations."""
        shards = record.shards[kept.hook_point]
        self.path = folder
        self.config = kept.config
        self.hook_point = kept.hook_point
        self.hook_points = kept.hook_points
        self.d_in = kept.d_in
        self.dtype = kept.dtype
        self.num_rows = table.num_rows
        self.context_len = table.context_len
        self.num_documents = record.entry.end.document
        self.num_tokens = self.num_rows * self.context_len
        self.statistics = kept.statistics
        self._manifest = kept._manifest
        self._index = HookIndex(
            cache=record.cache, hook_point=self.hook_point, d_in=self.d_in, dtype=self.dtype, shards=shards, files={}
        )
        self._reader = ShardReader(hook_folder(folder, self.hook_point), shards, context_len=self.context_len)
        self._rows = table

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the segment."""
        return self._index.cache

    @functools.cached_property
    def _table(self) -> TokenTable:
        return self._rows

    @functools.cached_property
    def _kinds_and_norms(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        norms = read_norms(hook_folder(self.path, self.hook_point), self._index.shards)
        massive = (self._rows.kinds == NORMAL) & (norms > self.statistics.massive_threshold)
        return np.where(massive, np.uint8(MASSIVE), self._rows.kinds), norms


class _JoinedSegment(JoinedStore):
    """Several hook points of a segment."""

    @functools.cached_property
    def _table(self) -> TokenTable:
        return self.stores[0]._table


def open_segment(ring: Ring, number: int, parts: Sequence[ActivationStore]) -> tuple[StoreView, LedgerEntry]:
    """Returns a whole segment's tokens to train on, and its line in the ledger.

    Args:
        ring: whose.
        number: which one.
        parts: hook points that are read, side by side: the stores of the cache that stays.

    Raises:
        StoreError: files are missing, truncated or foreign.
    """
    folder = ring.segment_folder(number)
    remedy = f"remove {str(folder)!r} and run the same command again: it is made anew"
    record = read_record(ring.record_path(number), SegmentRecord)
    if record is None or record.cache != ring.segment_identity(number):
        raise StoreError(f"ring: segment {number} is missing or of another ring; {remedy}")
    table = _read_table(folder, record.cache)
    records = [(hook_folder(folder, name), shard) for name, shards in record.shards.items() for shard in shards]
    problems = [problem for at, shard in records for problem in file_problems(at, shard, verify=False)]
    if table is None or problems:
        found = problems[0] if problems else "its token rows are gone or changed"
        raise StoreError(f"ring: segment {number}: {found}; {remedy}")
    stores = [_SegmentStore(folder, record, table, part) for part in parts]
    thresholds = {
        name: ActivationStore.open(ring.kept, name).statistics.massive_threshold for name in ring.cache.hook_points
    }
    mask = _training_mask(folder, record.shards, table, thresholds)
    return StoreView(stores[0] if len(stores) == 1 else _JoinedSegment(stores), mask), record.entry
