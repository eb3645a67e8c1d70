"""A store that is written ahead of a training and deleted behind it: which rows, in which segments, within which bytes.

    ring/
        manifest.json           stage "ring", config, the cache that it belongs to
        ledger.json             Ledger: where in the text each segment so far began and ended
        segment-00012/
            tokens.zarr         group: token, document [R, T] int32, kind [R, T] uint8
            tokens.json         PartRecord of the above
            hooks/<hook point>/shard-00000.zarr, .json as in a cache
            segment.json        SegmentRecord: written last, so a segment without it is not whole

Two segments fit the budget: one is trained on while the next one is written. A segment has the same number of whole shards
as every other, but at the end of the text, and begins with a document of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, field_validator

from saekit.activations.chunks import ChunkShape, chunk_shape
from saekit.activations.codec import CODECS, token_bytes
from saekit.activations.config import CacheConfig
from saekit.activations.joined import JoinedStore
from saekit.activations.layout import PartRecord, ShardRecord
from saekit.activations.plan import size_text
from saekit.activations.store import ActivationStore
from saekit.config import Config, config_sha256
from saekit.errors import ConfigError, StoreError
from saekit.manifest import read_manifest

__all__ = [
    "LEDGER_NAME",
    "RING_NAME",
    "SEGMENTS_HELD",
    "HeldOut",
    "Ledger",
    "LedgerEntry",
    "Place",
    "Ring",
    "RingConfig",
    "RingSizes",
    "SegmentRecord",
    "fit_segments",
    "plan_ring",
    "segment_bytes",
]

RING_NAME = "ring"
LEDGER_NAME = "ledger.json"
SEGMENT_RECORD_NAME = "segment.json"
SEGMENTS_HELD = 2
"""On disk at a time: one is read, one is written."""

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
# Records and zarr's metadata of a shard at one hook point, and of a segment's token rows; manifest, ledger, log and lock.
_SHARD_FILES_BYTES = 16 * 2**10
_SEGMENT_FILES_BYTES = 16 * 2**10
_RING_FILES_BYTES = 256 * 2**10
# Token id, document and kind; a norm at each hook point. Compressed by zarr, which can lose a little on what is random.
_ROW_BYTES_A_TOKEN = 9 * 1.02
_NORM_BYTES_A_TOKEN = 4 * 1.02
_SHARD_MARK_BYTES = 64
_CHUNK_END_BYTES = 4
_CHUNK_ALIGNMENT = 64
_INDEX_BYTES_A_CHUNK = 16
# A batch is never made of two segments: what is left of one is less than a batch, and must be little of it.
_LEAST_BATCHES = 2


class RingConfig(Config):
    """Activations made while SAEs are trained on them, so that a bounded disk serves any number of tokens."""

    disk: int = Field(ge=1)
    """Bytes that cache and ring together may take, e.g. "100GB"; SAEs and checkpoints are beside it."""
    devices: tuple[str, ...] = ()
    """Torch devices, one process that fills the ring on each; none: one process, where `cache.model.device` says."""

    @field_validator("disk", mode="before")
    @classmethod
    def _in_bytes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if found is None or found[2].lower() not in _UNITS:
            raise ValueError("needs a number of bytes, or one with a unit: 500MB, 100GB, 1.5TB")
        return int(float(found[1].replace("_", "")) * _UNITS[found[2].lower()])

    @property
    def identity(self) -> dict[str, object]:
        """What the order of the tokens depends on, as JSON values: everything but the devices."""
        return {"disk": self.disk}


class HeldOut(Config):
    """Which documents of the cache are for measuring, and so left out of the ring."""

    test_fraction: float
    """As `ActivationStore.split` takes it."""
    seed: int
    """The same."""
    places: tuple[tuple[str, ...], ...]
    """Hook points of each SAE, whose split depends a little on which tokens are massive there; sorted, each once."""


class Place(NamedTuple):
    """Where in the text a segment begins."""

    passes: int
    """How many times the text has been gone through before."""
    document: int
    """Index of its first document."""


class LedgerEntry(Config):
    """One segment, whether it is still on disk or not."""

    begin: Place
    """Of its first row."""
    end: Place
    """Of the next segment, unless the text holds no further row."""
    num_rows: int
    """Token rows."""
    num_tokens: int
    """That are trained on: normal at all hook points."""


class Ledger(Config):
    """All segments so far, in order."""

    ring: str
    """Identity of the ring."""
    segments: tuple[LedgerEntry, ...] = ()
    """From segment 0 on."""


class SegmentRecord(PartRecord):
    """Declares a segment whole; `files` are its token rows."""

    entry: LedgerEntry
    """Its place in the text."""
    shards: dict[str, tuple[ShardRecord, ...]]
    """Hook point -> shards in order of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingSizes:
    """What segments hold, and take of the budget."""

    segment_rows: int
    """Rows of each segment."""
    segment_tokens: int
    """Tokens of each segment, special ones included."""
    segment_bytes: int
    """Most that a segment takes."""
    kept_bytes: int
    """Of the cache that stays."""
    disk: int
    """The budget."""

    def summary(self, num_tokens: int) -> str:
        """Returns the ring as one line, for a training on `num_tokens`."""
        segments = -(-num_tokens // self.segment_tokens)
        return (
            f"{num_tokens:,} tokens in about {segments:,} segments of {self.segment_tokens:,}, of which {SEGMENTS_HELD} of"
            f" {size_text(self.segment_bytes)} are on disk at a time, with the cache of {size_text(self.kept_bytes)} within"
            f" {size_text(self.disk)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """Where a ring is, and its sizes."""

    folder: Path
    """Its own."""
    kept: Path
    """The cache that stays: held-out documents, statistics, and what is measured before and after training."""
    cache: CacheConfig
    """Of that cache; model, text, hook points and form are the ring's as well."""
    config: RingConfig
    """The budget."""
    split: HeldOut
    """Whose test documents are left out of the ring."""
    sizes: RingSizes
    """Of its segments."""
    token_bytes: int
    """Of one token at all hook points, as it is stored."""
    kept_sha256: str
    """Its identity."""

    @property
    def identity_values(self) -> dict[str, object]:
        """What the rows and their segments depend on, beside the cache."""
        return {"ring": self.config.identity, "split": self.split.to_dict(), "segment_rows": self.sizes.segment_rows}

    @property
    def identity(self) -> str:
        """Hash of all that the rows and their segments depend on."""
        return config_sha256(self.identity_values | {"cache": self.kept_sha256})

    def segment_folder(self, number: int) -> Path:
        """Returns the folder of a segment."""
        return self.folder / f"segment-{number:05d}"

    def segment_identity(self, number: int) -> str:
        """Returns what every part of a segment is stamped with."""
        return config_sha256({"ring": self.identity, "segment": number})

    def record_path(self, number: int) -> Path:
        """Returns the file that is there once the segment is whole."""
        return self.segment_folder(number) / SEGMENT_RECORD_NAME

    def held_out(self) -> frozenset[int]:
        """Returns the keys of the documents that are left out, see `TokenTable.document_keys`."""
        keys: set[int] = set()
        for place in self.split.places:
            stores = [ActivationStore.open(self.kept, name) for name in place]
            store = stores[0] if len(stores) == 1 else JoinedStore(stores)
            _, test = store.split(self.split.test_fraction, seed=self.split.seed)
            keys |= set(store.document_keys()[test.documents].tolist())
        return frozenset(keys)


def segment_bytes(config: CacheConfig, widths: Mapping[str, int], chunk: ChunkShape, num_rows: int) -> int:
    """Returns the most that a segment of so many rows can take, compressed or not.

    Args:
        config: of the cache.
        widths: hook point -> width of its activations.
        chunk: of the shards.
        num_rows: whole shards, or less than one.
    """
    tokens = num_rows * config.tokens.context_len
    num_shards = -(-num_rows // config.shard_rows)
    size = _SEGMENT_FILES_BYTES + int(tokens * _ROW_BYTES_A_TOKEN)
    for width in widths.values():
        codec = CODECS[config.dtype]
        stored = chunk.rows * chunk.positions * codec.width(width) * codec.array.itemsize
        if config.compression != "none":
            stored += stored // 128 + 128
        stored = -(-(stored + _CHUNK_END_BYTES) // _CHUNK_ALIGNMENT) * _CHUNK_ALIGNMENT + _INDEX_BYTES_A_CHUNK
        chunks = chunk.num_chunks(num_rows, config.tokens.context_len) + num_shards
        size += chunks * stored + num_shards * (_SHARD_MARK_BYTES + _SHARD_FILES_BYTES)
        size += int(tokens * _NORM_BYTES_A_TOKEN)
    return size


def plan_ring(
    config: RingConfig,
    kept: str | Path,
    folder: str | Path,
    *,
    split: HeldOut,
    batch_size: int,
) -> Ring:
    """Returns the ring in `folder` beside a finished cache; writes nothing.

    Args:
        config: the budget.
        kept: folder of the cache.
        folder: of the ring.
        split: which documents of the cache are left out.
        batch_size: tokens of a global batch of the training.

    Raises:
        ConfigError: the budget cannot hold two segments of a shard, or of a few batches; the least that works is named.
        StoreError: there is no finished cache.
    """
    kept = Path(kept)
    manifest = read_manifest(kept)
    if manifest is None or manifest.stage != "cache":
        raise StoreError(f"ring: no cache in {str(kept)!r}, needs a finished one beside it: run 'saekit cache' first")
    cache = CacheConfig.parse(manifest.config, where=f"cache {str(kept)!r}")
    stores = [ActivationStore.open(kept, name) for name in cache.hook_points]
    widths = {store.hook_point: store.d_in for store in stores}
    sizes = fit_segments(
        config,
        cache,
        widths,
        kept_bytes=sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()),
        batch_size=batch_size,
    )
    return Ring(
        folder=Path(folder),
        kept=kept,
        cache=cache,
        config=config,
        split=split,
        sizes=sizes,
        token_bytes=sum(store.token_bytes for store in stores),
        kept_sha256=stores[0].sha256,
    )


def fit_segments(
    config: RingConfig, cache: CacheConfig, widths: Mapping[str, int], *, kept_bytes: int, batch_size: int
) -> RingSizes:
    """Returns the largest segments of which the budget holds two beside the cache.

    Args:
        config: the budget.
        cache: whose model, hook points and form the ring has.
        widths: hook point -> width of its activations.
        kept_bytes: of the cache.
        batch_size: tokens of a global batch of the training.

    Raises:
        ConfigError: the budget cannot hold two segments of a shard, or of a few batches; the least that works is named.
    """
    chunk = chunk_shape(cache.tokens.context_len, [token_bytes(cache.dtype, width) for width in widths.values()])
    left = (config.disk - kept_bytes - _RING_FILES_BYTES) // SEGMENTS_HELD
    least_shards = -(-_LEAST_BATCHES * batch_size // (cache.shard_rows * cache.tokens.context_len))
    least = segment_bytes(cache, widths, chunk, least_shards * cache.shard_rows)
    if least > left:
        needed = kept_bytes + _RING_FILES_BYTES + SEGMENTS_HELD * least
        what = "one shard" if least_shards == 1 else f"{least_shards} shards"
        raise ConfigError(
            f"ring.disk: found {config.disk:,} bytes, needs at least {needed:,}: {kept_bytes:,} of the cache, and"
            f" {SEGMENTS_HELD} segments of {what} ({least:,} each); raise it, or lower cache.shard_tokens or cache.num_tokens"
        )
    # The size grows evenly with whole shards but for what a segment has once, so this is at most a little too few.
    shards = max(least_shards, int(left / least * least_shards))
    while segment_bytes(cache, widths, chunk, (shards + 1) * cache.shard_rows) <= left:
        shards += 1
    rows = shards * cache.shard_rows
    return RingSizes(
        segment_rows=rows,
        segment_tokens=rows * cache.tokens.context_len,
        segment_bytes=segment_bytes(cache, widths, chunk, rows),
        kept_bytes=kept_bytes,
        disk=config.disk,
    )
