"""Texts through a model into a cache: token rows, then one forward a batch, then shards, then statistics."""

import contextlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from saekit.activations.capture import BatchCapture, CapturedBatch
from saekit.activations.chunks import ChunkShape, chunk_shape
from saekit.activations.codec import AnyArray, token_bytes
from saekit.activations.config import CacheConfig
from saekit.activations.layout import (
    INDEX_NAME,
    KINDS_NAME,
    STATISTICS_NAME,
    TOKENS_RECORD_NAME,
    HookIndex,
    LocalFiles,
    PartRecord,
    ShardRecord,
    ShardSpan,
    file_problems,
    hook_folder,
    read_record,
    record_files,
    record_name,
    refuse_earlier,
    shard_file,
    shard_spans,
    write_record,
)
from saekit.activations.location import find_cache
from saekit.activations.plan import free_bytes, plan_cache
from saekit.activations.reader import ShardReader
from saekit.activations.remote import Remote
from saekit.activations.rows import TokenTable, read_token_table, write_token_table
from saekit.activations.statistics import Statistics, compute_statistics, massive_note, tell_massive, write_statistics
from saekit.activations.store import ActivationStore, cache_identity
from saekit.activations.stored import read_norms, write_arrays
from saekit.activations.verify import reopen_stage, verify_store
from saekit.activations.writer import Shard, ShardWriter, remove_leftovers, staged
from saekit.activations.writers import Writers, join_writers
from saekit.errors import ResourceError, SaekitError, StoreError
from saekit.manifest import MANIFEST_NAME, begin_stage, file_sha256, finish_stage, locked, read_manifest
from saekit.models.hooks import resolve
from saekit.models.load import LanguageModel, load_model
from saekit.models.texts import iter_documents, text_fingerprint
from saekit.models.tokens import TokenCounts, check_context_len, iter_token_rows
from saekit.progress import NO_PROGRESS, Progress

__all__ = ["Collector", "cache_activations"]


def cache_activations(
    config: CacheConfig, out: str | Path, *, lm: LanguageModel | None = None, progress: Progress = NO_PROGRESS
) -> ActivationStore:
    """Returns the finished cache in `out`, after doing what is missing of it.

    A run that was stopped goes on at its first missing shard, and ends with the same bytes as one that was not. A finished
    cache is only checked for missing and truncated files, which are made anew. Where torchrun or `accelerate launch` has
    started several processes, each writes its own shards, and the bytes are those that one would write.

    Args:
        out: folder, or `s3://` or `gs://` URL of one: then each shard is sent there when it is finished, and its record last.
        lm: the model of `config.model`, if it is loaded already.

    Raises:
        ConfigError: `out` holds a cache of another config, or of a model or text that has changed; the keys are named.
        HookPointError: a hook point that the model does not have.
        DataError: the text cannot be read or is empty.
        NonFiniteError: NaN or Inf in the activations; says where.
        StoreError: a value that the stored dtype cannot hold; says where.
        ResourceError: the disk is full or not writable, the URL cannot be reached, or another of the processes has ended; what is
            finished stays.
        MissingDependencyError: what writes to URLs is not installed.
    """
    out, remote = find_cache(out)
    lm = load_model(config.model) if lm is None else lm
    for hook_point in config.hook_points:
        resolve(lm, hook_point)
    check_context_len(config.tokens.context_len, lm)
    writers = join_writers()
    progress = progress if writers.is_first else NO_PROGRESS
    if not writers.first(lambda: _claim(config, out, remote, lm, progress)):
        if remote is not None and not writers.is_first:
            remote.sync()
        with contextlib.ExitStack() as stack:
            writers.first(lambda: stack.enter_context(locked(out)))
            manifest = read_manifest(out)
            assert manifest is not None, "_claim has written it"
            cache = cache_identity(manifest)
            Collector(config, out, lm, progress, writers, cache=cache, remote=remote).run()
    return ActivationStore.open(out, config.hook_points[0])


def _claim(config: CacheConfig, out: Path, remote: Remote | None, lm: LanguageModel, progress: Progress) -> bool:
    """Returns whether the folder holds the finished cache already; claims it where not."""
    if remote is not None:
        remote.sync()
    refuse_earlier(out)
    if read_manifest(out) is None:
        progress.say(plan_cache(config, out, lm=lm, upload_to=None if remote is None else remote.url).summary())
    inputs = {
        "model": lm.fingerprint,
        "text": text_fingerprint(config.text),
        "tokenizer": lm.tokenizer_fingerprint,
    }
    state = begin_stage(out, "cache", config, inputs)
    if state == "new" and remote is not None:
        remote.push(out / MANIFEST_NAME)
    if state != "complete":
        return False
    problems = verify_store(out, checksums=False)
    if problems:
        progress.say(f"{problems[0]}{f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''}: made anew")
        reopen_stage(out)
    return not problems


class Collector:
    """One run of the cache stage."""

    def __init__(
        self,
        config: CacheConfig,
        out: Path,
        lm: LanguageModel,
        progress: Progress,
        writers: Writers,
        *,
        cache: str,
        remote: Remote | None = None,
    ) -> None:
        """Does nothing yet; `cache` is the identity that every part is stamped with."""
        self.config = config
        self.out = out
        self.remote = remote
        self.lm = lm
        self.progress = progress
        self.writers = writers
        self.cache = cache

    def run(self) -> None:
        """Does every missing part, then declares the cache finished."""
        self.writers.first(self._prepare)
        if self.remote is not None and not self.writers.is_first:
            self.remote.sync()
        table = read_token_table(self.out, cache=self.cache)
        assert table is not None, "the first process has written it"
        spans = shard_spans(table.num_rows, self.config.shard_rows)
        failed: SaekitError | None = None
        try:
            self.capture_shards(table, spans)
        except SaekitError as error:
            failed = error
        self.writers.check(failed)
        counts: dict[str, object] = {
            "rows": table.num_rows,
            "tokens": table.tokens.size,
            "documents": len(table.document_keys),
            "shards": len(spans) * len(self.config.hook_points),
        }
        content = {"tokens": file_sha256(self.out / TOKENS_RECORD_NAME)}
        hooks: dict[str, object] = {}
        if self.remote is not None and self.writers.world_size > 1:
            # The others' records.
            self.remote.sync()
        for hook_point in self.config.hook_points:
            statistics, digest = _finish_hook_point(self, hook_point, table, spans)
            content[hook_point] = digest
            hooks[hook_point] = {
                "normal": statistics.num_normal,
                "padding": statistics.num_padding,
                "special": statistics.num_special,
                "massive": statistics.num_massive,
            }
        self.writers.first(lambda: self._finish(counts | {"tokens_by_kind": hooks, "sha256": content}))
        if self.remote is not None:
            self.remote.clear()

    def _finish(self, counts: dict[str, object]) -> None:
        finish_stage(self.out, counts)
        if self.remote is not None:
            self.remote.push(self.out / MANIFEST_NAME)

    def _prepare(self) -> None:
        """Removes what a stopped run left, and writes the token rows where they are not there."""
        remove_leftovers(self.out, *(hook_folder(self.out, name) for name in self.config.hook_points))
        if read_token_table(self.out, cache=self.cache) is not None:
            return
        counts = TokenCounts()
        context_len = self.config.tokens.context_len
        table = write_token_table(
            self.out,
            iter_documents(self.config.text),
            lambda documents: iter_token_rows(documents, self.lm.tokenizer, self.config.tokens, counts=counts),
            cache=self.cache,
            num_rows=math.ceil(self.config.num_tokens / context_len),
            context_len=context_len,
        )
        if self.remote is not None and (record := read_record(self.out / TOKENS_RECORD_NAME, PartRecord)) is not None:
            self.remote.publish(self.out, TOKENS_RECORD_NAME, record)
        owned = table.documents[table.documents >= 0]
        num_empty = len(table.document_keys) - len(np.unique(owned))
        empty = f", {num_empty:,} of which are empty" if num_empty else ""
        self.progress.say(f"{table.num_rows:,} rows from {len(table.document_keys):,} documents{empty}")
        for note in counts.notes():
            self.progress.say(note)
        if table.tokens.size < self.config.num_tokens:
            self.progress.say(
                f"the text ends after {table.tokens.size:,} of the {self.config.num_tokens:,} tokens asked for:"
                f" all of it is cached but {counts.dropped_tokens:,} tokens that do not fill a row"
            )

    def capture_shards(self, table: TokenTable, spans: list[ShardSpan]) -> None:
        """Writes the shards that are missing, each process its share of them."""
        missing = self.writers.first(
            lambda: {
                span.index: names
                for span in spans
                if (names := [name for name in self.config.hook_points if self.shard_record(name, span) is None])
            }
        )
        own = self.writers.share([span for span in spans if span.index in missing])
        row_tokens = table.context_len
        done = sum(span.num_rows for span in spans if span.index not in missing) * row_tokens
        total = done + sum(span.num_rows for span in own) * row_tokens
        with (
            self.progress.task("cache", total, "tokens", done=done) as task,
            ShardWriter(len(self.config.hook_points)) as writer,
        ):
            for span in own:
                buffers: dict[str, _Buffer] = {}
                rows = np.arange(span.first_row, span.first_row + span.num_rows)
                capture = BatchCapture(self.lm, missing[span.index], self.config.dtype, shard=span.index)
                for batch in capture.batches(table, rows, self.config.batch_size):
                    self._keep(batch, span, row_tokens, buffers)
                    task.advance(len(batch.rows) * row_tokens)
                self._check_disk(buffers)
                shape = self._chunk_shape(span, buffers, row_tokens)
                writer.submit([buffer.shard(self, name, span, shape) for name, buffer in buffers.items()])

    def _chunk_shape(self, span: ShardSpan, buffers: dict[str, "_Buffer"], context_len: int) -> ChunkShape:
        """Returns the shape of chunks, which depends on the widths of all hook points, also of those whose shard is in place."""
        widths = [buffer.d_in for buffer in buffers.values()]
        for name in self.config.hook_points:
            if name not in buffers:
                record = self.shard_record(name, span)
                assert record is not None, "what is not missing has a record"
                widths.append(record.d_in)
        return chunk_shape(context_len, [token_bytes(self.config.dtype, width) for width in widths])

    def _keep(self, batch: CapturedBatch, span: ShardSpan, context_len: int, buffers: dict[str, "_Buffer"]) -> None:
        place = slice(int(batch.rows[0]) - span.first_row, int(batch.rows[-1]) - span.first_row + 1)
        for name, stored in batch.stored.items():
            if name not in buffers:
                buffers[name] = _Buffer(
                    (span.num_rows, context_len, stored.shape[-1]), batch.widths[name], stored.dtype
                )
            buffers[name].activations[place] = stored
            buffers[name].norm[place] = batch.norm[name]

    def _check_disk(self, buffers: dict[str, "_Buffer"]) -> None:
        needed, free = sum(buffer.activations.nbytes for buffer in buffers.values()), free_bytes(self.out)
        if needed > free:
            raise ResourceError(
                f"cache {str(self.out)!r}: {free / 1e9:,.2f} GB free on that disk, the next shard needs {needed / 1e9:,.2f}"
                " GB; free some and run the same command again to go on"
            )

    def shard_record(self, hook_point: str, span: ShardSpan) -> ShardRecord | None:
        """Returns the record of a shard that is in place, or None."""
        folder = hook_folder(self.out, hook_point)
        try:
            record = read_record(folder / record_name(span.index), ShardRecord)
        except StoreError:
            return None
        if record is None or record.cache != self.cache or record.span != span or record.hook_point != hook_point:
            return None
        return None if file_problems(folder, record, verify=False, files=self.remote or LocalFiles()) else record


class _Buffer:
    """One shard of one hook point while it fills."""

    def __init__(self, shape: tuple[int, int, int], d_in: int, dtype: np.dtype[np.generic]) -> None:
        self.d_in = d_in
        self.activations: AnyArray = np.empty(shape, dtype)
        self.norm = np.empty(shape[:2], np.float32)

    def shard(self, run: Collector, hook_point: str, span: ShardSpan, chunk: ChunkShape) -> Shard:
        return Shard(
            folder=hook_folder(run.out, hook_point),
            cache=run.cache,
            hook_point=hook_point,
            span=span,
            dtype=run.config.dtype,
            compression=run.config.compression,
            chunk=chunk,
            d_in=self.d_in,
            activations=self.activations,
            norm=self.norm,
            remote=run.remote,
        )


def _finish_hook_point(
    run: Collector, hook_point: str, table: TokenTable, spans: list[ShardSpan]
) -> tuple[Statistics, str]:
    """Tells massive tokens, writes statistics and index of the hook point, and returns the statistics and the index's sha256."""
    folder = hook_folder(run.out, hook_point)
    records = [run.shard_record(hook_point, span) for span in spans]
    shards = [record for record in records if record is not None]
    assert len(shards) == len(spans), "every shard has just been written or checked"
    if run.remote is not None:
        for record in shards:
            run.remote.fetch(folder, record, but=shard_file(record.span.index))
    norms = read_norms(folder, shards)
    kinds, threshold = tell_massive(table.kinds, norms, factor=run.config.massive_factor)
    reader = ShardReader(folder, shards, context_len=table.context_len, remote=run.remote)

    def read_rows(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = reader.rows(rows).to(torch.float32).numpy()
        return values

    statistics = compute_statistics(
        read_rows, kinds, norms, massive_threshold=threshold, progress=run.progress, writers=run.writers
    )
    if note := massive_note(statistics):
        run.progress.say(f"{hook_point}: {note}")

    def write() -> str:
        with staged(folder / KINDS_NAME) as temporary:
            write_arrays(temporary, {"kind": kinds, "norm": norms})
        write_statistics(folder / STATISTICS_NAME, statistics)
        index = HookIndex(
            cache=run.cache,
            hook_point=hook_point,
            d_in=reader.d_in,
            dtype=run.config.dtype,
            shards=tuple(shards),
            files=record_files(folder, KINDS_NAME, STATISTICS_NAME),
        )
        write_record(folder / INDEX_NAME, index)
        if run.remote is not None:
            run.remote.publish(folder, INDEX_NAME, index)
        return file_sha256(folder / INDEX_NAME)

    return statistics, run.writers.first(write)
