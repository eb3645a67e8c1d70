"""What a cache will cost, told before it is made."""

import itertools
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from saekit.activations.codec import token_bytes
from saekit.activations.config import CacheConfig
from saekit.errors import ResourceError
from saekit.models.hooks import capture, resolve
from saekit.models.load import LanguageModel, load_model
from saekit.models.texts import iter_documents
from saekit.models.tokens import check_context_len, iter_token_rows

__all__ = ["CachePlan", "CacheSize", "cache_size", "duration_text", "free_bytes", "plan_cache", "size_text"]

# Token ids, documents and kinds before compression, and norm and kind once more for each hook point.
_ROW_BYTES_A_TOKEN = 9
_HOOK_BYTES_A_TOKEN = 2 * (4 + 1)


class CacheSize(NamedTuple):
    """What a cache will hold."""

    num_tokens: int
    """Asked for, rounded up to whole rows."""
    num_rows: int
    """Token rows."""
    size_bytes: int
    """On disk, when finished."""


def cache_size(config: CacheConfig, widths: Mapping[str, int]) -> CacheSize:
    """Returns the size of a cache with hook points of these widths, were the text to last."""
    num_rows = math.ceil(config.num_tokens / config.tokens.context_len)
    num_tokens = num_rows * config.tokens.context_len
    a_token = _ROW_BYTES_A_TOKEN + sum(
        token_bytes(config.dtype, width) + _HOOK_BYTES_A_TOKEN for width in widths.values()
    )
    return CacheSize(num_tokens, num_rows, num_tokens * a_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """Sizes of a cache that is not there yet."""

    num_tokens: int
    """Asked for, rounded up to whole rows."""
    num_rows: int
    """Token rows."""
    num_shards: int
    """Of each hook point."""
    widths: dict[str, int]
    """Hook point -> width of its activations."""
    size_bytes: int
    """On disk, when finished; before compression, if there is any."""
    is_compressed: bool = False
    """Whether it will be smaller than that."""
    free_bytes: int
    """On that disk now."""
    tokens_per_second: float
    """Of one short forward to the last hook point; a busy machine shows."""
    upload_to: str | None = None
    """URL where the shards go; None = they stay."""
    scratch_bytes: int = 0
    """On that disk at a time, where shards do not stay: those that are being sent, and the small files."""

    @property
    def seconds(self) -> float:
        """Estimated time of the forwards."""
        return self.num_tokens / self.tokens_per_second

    def summary(self) -> str:
        """Returns the plan as one line."""
        hooks = ", ".join(f"{name} (width {width:,})" for name, width in self.widths.items())
        disk = f"{size_text(self.free_bytes)} free"
        if self.upload_to is not None:
            disk = f"to upload to {self.upload_to}; up to {size_text(self.scratch_bytes)} here, {disk}"
        return (
            f"caching {self.num_tokens:,} tokens in {self.num_rows:,} rows at {hooks}:"
            f" {'at most ' if self.is_compressed else ''}{size_text(self.size_bytes)} in {self.num_shards:,} shard{'s' if self.num_shards > 1 else ''}"
            f" ({disk}),"
            f" about {duration_text(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s"
        )


def plan_cache(
    config: CacheConfig, out: str | Path, *, lm: LanguageModel | None = None, upload_to: str | None = None
) -> CachePlan:
    """Returns what caching will cost, from one short timed forward on the first rows of the text.

    Args:
        upload_to: URL where the shards go, if they do not stay in `out`.

    Raises:
        ResourceError: the disk cannot hold the cache.
        HookPointError: a hook point that the model does not have.
        DataError: the text cannot be read, or holds too little for one row.
    """
    lm = load_model(config.model) if lm is None else lm
    for hook_point in config.hook_points:
        resolve(lm, hook_point)
    check_context_len(config.tokens.context_len, lm)
    rows = iter_token_rows(iter_documents(config.text), lm.tokenizer, config.tokens)
    tokens = torch.stack([torch.from_numpy(row.tokens) for row in itertools.islice(rows, config.batch_size)]).long()
    capture(lm, tokens[:1], config.hook_points)
    started = time.perf_counter()
    hidden = capture(lm, tokens, config.hook_points)
    for values in hidden.values():
        values.flatten()[-1].item()  # waits for the device
    seconds = time.perf_counter() - started

    widths = {name: values.shape[-1] for name, values in hidden.items()}
    num_tokens, num_rows, size_bytes = cache_size(config, widths)
    small = num_tokens * (_ROW_BYTES_A_TOKEN + _HOOK_BYTES_A_TOKEN * len(widths))
    # Those of one span of rows are sent while the next ones are computed.
    shards = (
        min(num_rows, config.shard_rows)
        * config.tokens.context_len
        * sum(token_bytes(config.dtype, width) for width in widths.values())
    )
    plan = CachePlan(
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_shards=math.ceil(num_rows / config.shard_rows),
        widths=widths,
        size_bytes=size_bytes,
        is_compressed=config.compression != "none",
        free_bytes=free_bytes(Path(out)),
        tokens_per_second=tokens.numel() / seconds,
        upload_to=upload_to,
        scratch_bytes=0 if upload_to is None else small + shards,
    )
    needed = plan.size_bytes if upload_to is None else plan.scratch_bytes
    # How much smaller compression makes it shows only as it is written; a disk that fills then stops the cache, which goes on later.
    if needed > plan.free_bytes and not plan.is_compressed:
        raise ResourceError(
            f"cache {str(out)!r}: {size_text(plan.free_bytes)} free on that disk, needs {size_text(needed)}"
            f" for {num_tokens:,} tokens; free some, choose another disk, or cache fewer tokens"
        )
    return plan


def free_bytes(path: Path) -> int:
    """Returns the free bytes of the disk that `path` is or will be on."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def size_text(num_bytes: int) -> str:
    """Returns a number of bytes for people."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.2f} GB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


def duration_text(seconds: float) -> str:
    """Returns a time for people."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
