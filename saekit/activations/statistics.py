"""What a cache says about its activations as a whole, and which tokens it leaves out of that.

Massive activations. A few tokens, mostly the first of a row and some delimiters, carry norms tens to hundreds of times
the usual one: the model parks attention there (attention sinks). On SmolLM2-135M layer 15, 0.03 % of the tokens hold 84 %
of the variance, so any mean, scale or loss that includes them describes them alone. The rule: a token that is neither
padding nor special is massive where its norm exceeds `massive_factor` (10) times the median norm of all such tokens. They
stay in the store under a kind of their own and are counted and reported apart.

Source: Sun et al. 2024, "Massive Activations in Large Language Models", arXiv:2402.17762; Xiao et al. 2023, "Efficient
Streaming Language Models with Attention Sinks", arXiv:2309.17453.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from saekit.activations.rows import MASSIVE, NORMAL, PADDING, SPECIAL
from saekit.activations.writers import ALONE, Writers
from saekit.errors import DataError, StoreError
from saekit.manifest import write_json
from saekit.progress import NO_PROGRESS, Progress

__all__ = [
    "QUANTILES",
    "Statistics",
    "compute_statistics",
    "massive_note",
    "read_statistics",
    "tell_massive",
    "write_statistics",
]

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Of the norm, in this order in `Statistics.norm_quantiles`."""

# Sums run over blocks of this many tokens, counted from the first row on: shards and threads leave no trace in them.
_BLOCK_TOKENS = 4096
_GROUP_BLOCKS = 64
_MAX_WORKERS = 8

Float64Array = npt.NDArray[np.float64]
Blocks = list[npt.NDArray[np.int64]]
ReadRows = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Of one hook point. Over normal tokens, where nothing else is said."""

    mean: Float64Array
    """`[D]`."""
    mean_norm: float
    """E||x||."""
    mean_norm_centred: float
    """E||x - mean||."""
    median_norm: float
    """Of ||x||."""
    norm_quantiles: Float64Array
    """Of ||x|| at `QUANTILES`."""
    total_variance: float
    """E||x - mean||^2: the sum of the variances of all dimensions."""
    position_norms: Float64Array
    """`[T]` mean ||x|| at each position; NaN where no normal token stands there."""
    position_norms_all: Float64Array
    """`[T]` the same over all tokens but padding."""
    num_normal: int
    """Tokens that train and count."""
    num_padding: int
    """Filled-up places."""
    num_special: int
    """BOS, EOS and separators."""
    num_massive: int
    """Tokens that the rule leaves out."""
    massive_threshold: float
    """The norm above which it does."""
    max_norm: float
    """Over all tokens but padding."""
    massive_variance_share: float
    """Part of the total variance over all tokens but padding (about their own mean) that massive tokens hold, 0 to 1."""
    special_variance_share: float
    """The same of special tokens."""

    @property
    def num_tokens(self) -> int:
        """All places, padding included."""
        return self.num_normal + self.num_padding + self.num_special + self.num_massive


def tell_massive(
    kinds: npt.NDArray[np.uint8], norms: npt.NDArray[np.float32], *, factor: float
) -> tuple[npt.NDArray[np.uint8], float]:
    """Returns a copy of `kinds` with massive tokens told, and the norm above which they are.

    Raises:
        DataError: no token is normal.
    """
    normal = kinds == NORMAL
    if not normal.any():
        raise DataError("token rows: every token is special or padding, needs text")
    threshold = factor * float(np.median(norms[normal]))
    return np.where(normal & (norms > threshold), np.uint8(MASSIVE), kinds), threshold


def compute_statistics(
    read_rows: ReadRows,
    kinds: npt.NDArray[np.uint8],
    norms: npt.NDArray[np.float32],
    *,
    massive_threshold: float,
    progress: Progress = NO_PROGRESS,
    writers: Writers = ALONE,
) -> Statistics:
    """Returns the statistics of one hook point; reads all activations twice, each of several processes its part of them.

    The same values to the last bit for any shard length, any number of threads and processes, and after any resume.

    Args:
        read_rows: ascending row ids `[n]` -> float32 `[n, T, D]`; is called from several threads.
        kinds: `[R, T]` with massive tokens told.
        norms: `[R, T]`.
        massive_threshold: as the rule told it.
        progress: is told how far it is.
        writers: processes that call this with the same arguments; each gets the statistics.
    """
    num_rows, context_len = kinds.shape
    step = max(1, _BLOCK_TOKENS // context_len)
    blocks = [np.arange(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]

    def sums(rows: npt.NDArray[np.int64]) -> Float64Array:
        x, kind = _block(read_rows, kinds, rows)
        members = [x[kind == k] for k in range(4)]
        squares = np.array([np.einsum("nd,nd->", m, m) for m in members])
        return np.column_stack([np.stack([m.sum(axis=0) for m in members]), squares])

    def centred(rows: npt.NDArray[np.int64]) -> Float64Array:
        x, kind = _block(read_rows, kinds, rows)
        offset = x[kind == NORMAL] - mean
        squares = np.einsum("nd,nd->n", offset, offset)
        return np.array([np.sqrt(squares).sum(), squares.sum()])

    counts = np.bincount(kinds.ravel(), minlength=4)
    tokens = 2 * sum(len(rows) for group in writers.share(_groups(blocks)) for rows in group) * context_len
    with progress.task("statistics", tokens, "tokens") as task:
        total = _total(sums, blocks, writers, lambda: task.advance(step * context_len))
        by_kind, kind_squares = total[:, :-1], total[:, -1]
        mean = by_kind[NORMAL] / counts[NORMAL]
        centred_norms, centred_squares = _total(
            centred, blocks, writers, lambda: task.advance(step * context_len)
        ).tolist()

    normal = norms[kinds == NORMAL].astype(np.float64)
    shares = _variance_shares(by_kind, kind_squares, counts)
    quantiles = np.quantile(normal, QUANTILES)
    return Statistics(
        mean=mean,
        mean_norm=float(normal.mean()),
        mean_norm_centred=centred_norms / int(counts[NORMAL]),
        median_norm=float(np.median(normal)),
        norm_quantiles=quantiles,
        total_variance=centred_squares / int(counts[NORMAL]),
        position_norms=_mean_at_positions(norms, kinds == NORMAL),
        position_norms_all=_mean_at_positions(norms, kinds != PADDING),
        num_normal=int(counts[NORMAL]),
        num_padding=int(counts[PADDING]),
        num_special=int(counts[SPECIAL]),
        num_massive=int(counts[MASSIVE]),
        massive_threshold=massive_threshold,
        max_norm=float(norms[kinds != PADDING].max()),
        massive_variance_share=shares[MASSIVE],
        special_variance_share=shares[SPECIAL],
    )


def _block(
    read_rows: ReadRows, kinds: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]
) -> tuple[Float64Array, npt.NDArray[np.uint8]]:
    x = read_rows(rows)
    return x.reshape(-1, x.shape[-1]).astype(np.float64), kinds[rows].ravel()


def _groups(blocks: Blocks) -> list[Blocks]:
    """Returns the blocks in groups; sums are made in a group first, so that processes exchange few of them."""
    return [blocks[first : first + _GROUP_BLOCKS] for first in range(0, len(blocks), _GROUP_BLOCKS)]


def _total(
    function: Callable[[npt.NDArray[np.int64]], Float64Array],
    blocks: Blocks,
    writers: Writers,
    done: Callable[[], None],
) -> Float64Array:
    """Returns the sum of `function` over the blocks, in their order, whichever process and thread took which."""
    own: dict[int, Float64Array] = {}
    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1), thread_name_prefix="saekit-statistics") as pool:
        for number, group in writers.share(list(enumerate(_groups(blocks)))):
            for part in pool.map(function, group):
                own[number] = own[number] + part if number in own else part
                done()
    sums = {number: part for parts in writers.gather(own) for number, part in parts.items()}
    first, *others = (sums[number] for number in sorted(sums))
    return sum(others, start=first)


def _variance_shares(by_kind: Float64Array, squares: Float64Array, counts: npt.NDArray[np.int64]) -> list[float]:
    """Returns, for each kind, its part of the sum of ||x - m||^2 over all tokens but padding, whose mean is m.

    Args:
        by_kind: `[4, D]` sum of x.
        squares: `[4]` sum of ||x||^2.
        counts: `[4]` tokens.
    """
    kept = [NORMAL, SPECIAL, MASSIVE]
    mean = by_kind[kept].sum(axis=0) / counts[kept].sum()
    squares = squares - 2 * by_kind @ mean + counts * (mean @ mean)
    squares[PADDING] = 0.0
    whole = float(squares.sum())
    return [float(value) / whole if whole > 0 else 0.0 for value in squares]


def _mean_at_positions(norms: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_]) -> Float64Array:
    counts = mask.sum(axis=0)
    sums = np.where(mask, norms, np.float32(0.0)).sum(axis=0, dtype=np.float64)
    means = np.full(len(counts), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def massive_note(statistics: Statistics) -> str | None:
    """Returns what is to be known of a hook point's massive activations, as one line; None where it has none."""
    if not statistics.num_massive:
        return None
    counted = statistics.num_tokens - statistics.num_padding
    return (
        f"{statistics.num_massive:,} massive activations of {counted:,} tokens"
        f" ({statistics.num_massive / counted:.2%}) hold {statistics.massive_variance_share:.0%} of the variance"
        f" (norm above {statistics.massive_threshold:,.0f}, up to {statistics.max_norm:,.0f}, against a median of"
        f" {statistics.median_norm:,.0f}): kept in the cache, left out of training and statistics"
    )


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes statistics as JSON, exactly."""
    values: dict[str, object] = {}
    for field in fields(statistics):
        value = getattr(statistics, field.name)
        if isinstance(value, np.ndarray):
            value = [None if math.isnan(number) else number for number in value.tolist()]
        values[field.name] = value
    write_json(path, values)


def read_statistics(path: Path) -> Statistics:
    """Returns what `write_statistics` wrote.

    Raises:
        StoreError: missing, or not such a file.
    """
    try:
        adapter = TypeAdapter(dict[str, float | int | list[float | None]])
        values = adapter.validate_json(path.read_bytes())
        arrays = {
            name: np.array([math.nan if number is None else number for number in value], np.float64)
            for name, value in values.items()
            if isinstance(value, list)
        }
        return Statistics(**(values | arrays))  # type: ignore[arg-type]  # checked right above, by name
    except (OSError, ValidationError, TypeError) as error:
        raise StoreError(f"{str(path)!r}: no statistics that this version can read; verify the cache") from error
