# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""Encoders in Triton: one matrix product whose epilogue prepares the selection, then an exact selection per row.

top-k: the epilogue writes z and, per group of G columns, the largest sort key. The k largest entries of a row lie in the
k groups with the largest keys (equal keys: lowest group first), so the second kernel finds those groups by bisection on
integer keys, reads k * G values and bisects again: exact, ties included, with no sort of a row.

threshold: the epilogue packs z > bound into one bit per entry and writes z only where the bit is set; two small kernels
count the bits and expand them into CSR.

Both work on chunks of rows, so that z takes a bounded amount of memory whatever N is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Interpreted, tl.dot multiplies the raw bits of bfloat16 (triton-lang/triton#11584: not supported); operands are widened.
INTERPRETED = triton.knobs.runtime.interpret

_CHUNK_BYTES = 1 << 30
# A multiple of the row block, so that no chunk but the last leaves part of one idle.
_CHUNK_ROWS_STEP = 128
_INT32_MIN = tl.constexpr(-(2**31))
_INT32_MAX = tl.constexpr(2**31 - 1)
# Keys that one program of the selection can hold in registers; past it, torch sorts the rows of z.
MAX_SELECTED_FROM = 16384


class Tile(NamedTuple):
    """Block shape and launch options of the matrix product."""

    block_n: int
    block_f: int
    block_d: int
    num_warps: int
    num_stages: int


# 16-bit operands: wgmma on sm_90, 138 to 183 registers, no spills; with 4 warps the epilogue spills 0.7 KB a thread.
HALF_TILE = Tile(128, 128, 64, 8, 3)
# float32 without TF32 runs on the FMA units; a smaller tile keeps it in registers.
FLOAT_TILE = Tile(64, 64, 32, 4, 2)
# Interpreted, a program is a Python call: small tiles keep odd shapes odd and tests quick.
_INTERPRETED_TILE = Tile(16, 32, 16, 4, 1)


@triton.jit
def _tile_of(program, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Row and column block of a program; GROUP row blocks share each column block, so that both stay in L2."""
    width = GROUP * num_column_blocks
    group = program // width
    first = group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    return first + (program % width) % size, (program % width) // size


@triton.jit
def _product(
    x_ptr, weight_ptr, bias_ptr, rows, columns, N, F, D,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A [BLOCK_N, BLOCK_F] tile of x @ weight.T + bias in float32; -0 becomes +0."""
    inner = tl.arange(0, BLOCK_D)
    safe_rows = tl.where(rows < N, rows, 0).to(tl.int64)
    safe_columns = tl.where(columns < F, columns, 0).to(tl.int64)
    x_ptrs = x_ptr + safe_rows[:, None] * D + inner[None, :]
    weight_ptrs = weight_ptr + safe_columns[None, :] * D + inner[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        a = tl.load(x_ptrs, mask=inner[None, :] < D - start, other=0.0)
        b = tl.load(weight_ptrs, mask=inner[:, None] < D - start, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        x_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    acc += tl.load(bias_ptr + safe_columns)[None, :].to(tl.float32)
    # A negative sum that underflows is -0, which sorts below +0 as an integer.
    return acc + 0.0


@triton.jit
def _sort_key(value):
    """int32 that orders as the float32 does, NaN above everything; -0 must have become +0."""
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ _INT32_MAX, bits)
    return tl.where(value != value, _INT32_MAX, key)


@triton.jit
def topk_product_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, z_ptr, group_key_ptr, N, F, D, num_groups,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z [N, F] float32, and the largest sort key of each GROUP_SIZE columns [N, num_groups]."""
    row_block, column_block = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), 8)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_F + tl.arange(0, BLOCK_F)
    z = _product(x_ptr, weight_ptr, bias_ptr, rows, columns, N, F, D, BLOCK_N, BLOCK_F, BLOCK_D, UPCAST)
    is_inside = (rows < N)[:, None] & (columns < F)[None, :]
    tl.store(z_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], z, mask=is_inside)
    keys = tl.where((columns < F)[None, :], _sort_key(z), _INT32_MIN)
    group_keys = tl.max(tl.reshape(keys, (BLOCK_N, BLOCK_F // GROUP_SIZE, GROUP_SIZE)), axis=2)
    groups = column_block * (BLOCK_F // GROUP_SIZE) + tl.arange(0, BLOCK_F // GROUP_SIZE)
    is_group = (rows < N)[:, None] & (groups < num_groups)[None, :]
    tl.store(group_key_ptr + rows.to(tl.int64)[:, None] * num_groups + groups[None, :], group_keys, mask=is_group)


@triton.jit
def _kth_key(keys, is_valid, K: tl.constexpr):
    """A key with at least K valid keys >= it, and exactly K of them unless the K-th largest key itself is tied."""
    low = tl.min(tl.where(is_valid, keys, _INT32_MAX), 0)
    high = tl.max(tl.where(is_valid, keys, _INT32_MIN), 0)
    count = tl.sum(is_valid.to(tl.int32), 0)
    while (low < high) & (count != K):
        # ceil((low + high) / 2) without overflow
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        above = tl.sum((is_valid & (keys >= middle)).to(tl.int32), 0)
        is_enough = above >= K
        low = tl.where(is_enough, middle, low)
        count = tl.where(is_enough, above, count)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def _first_k(keys, is_valid, key, K: tl.constexpr):
    """The K valid places with the largest keys, lowest place first among equals, given `_kth_key`."""
    is_above = is_valid & (keys > key)
    is_equal = is_valid & (keys == key)
    num_wanted = K - tl.sum(is_above.to(tl.int32), 0)
    return is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= num_wanted))


@triton.jit
def topk_select_fwd_kernel(
    z_ptr, group_key_ptr, scratch_ptr, value_ptr, index_ptr, F, num_groups,
    K: tl.constexpr, NUM_BEST: tl.constexpr, BLOCK_BEST: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """The K largest of one row, in order of rising column. NUM_BEST = min(K, num_groups) groups are read."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_GROUPS)
    is_group = groups < num_groups
    group_keys = tl.load(group_key_ptr + row * num_groups + groups, mask=is_group, other=_INT32_MIN)
    is_best = _first_k(group_keys, is_group, _kth_key(group_keys, is_group, NUM_BEST), NUM_BEST)
    places = tl.cumsum(is_best.to(tl.int32), 0) - 1
    tl.store(scratch_ptr + row * NUM_BEST + places, groups, mask=is_best)
    tl.debug_barrier()
    slots = tl.arange(0, BLOCK_BEST)
    best = tl.load(scratch_ptr + row * NUM_BEST + slots, mask=slots < NUM_BEST, other=0)
    columns = best[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    is_column = (slots < NUM_BEST)[:, None] & (columns < F)
    columns = tl.reshape(columns, (BLOCK_BEST * GROUP_SIZE,))
    is_column = tl.reshape(is_column, (BLOCK_BEST * GROUP_SIZE,))
    z = tl.load(z_ptr + row * F + columns, mask=is_column, other=float("-inf"))
    keys = _sort_key(z)
    is_chosen = _first_k(keys, is_column, _kth_key(keys, is_column, K), K)
    places = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(index_ptr + row * K + places, columns.to(tl.int64), mask=is_chosen)
    tl.store(value_ptr + row * K + places, z, mask=is_chosen)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def threshold_product_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, bound_ptr, z_ptr, bits_ptr, N, F, D, num_words,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Bit f % 32 of bits [N, num_words] is set where z is not <= bound; z [N, F] is written only there."""
    row_block, column_block = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), 8)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_F + tl.arange(0, BLOCK_F)
    z = _product(x_ptr, weight_ptr, bias_ptr, rows, columns, N, F, D, BLOCK_N, BLOCK_F, BLOCK_D, UPCAST)
    bound = tl.load(bound_ptr + columns, mask=columns < F, other=float("inf"))
    is_kept = ((z > bound[None, :]) | (z != z)) & (rows < N)[:, None] & (columns < F)[None, :]
    tl.store(z_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], z, mask=is_kept)
    bits = is_kept.to(tl.int32) << (tl.arange(0, BLOCK_F) % 32)[None, :]
    words = tl.reduce(tl.reshape(bits, (BLOCK_N, BLOCK_F // 32, 32)), 2, _or)
    word_columns = column_block * (BLOCK_F // 32) + tl.arange(0, BLOCK_F // 32)
    is_word = (rows < N)[:, None] & (word_columns < num_words)[None, :]
    tl.store(bits_ptr + rows.to(tl.int64)[:, None] * num_words + word_columns[None, :], words, mask=is_word)


@triton.jit
def _popcount(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def threshold_count_fwd_kernel(bits_ptr, count_ptr, num_words, BLOCK_WORDS: tl.constexpr):
    """Number of set bits of each row: int64 [N]."""
    row = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, BLOCK_WORDS)
    bits = tl.load(bits_ptr + row * num_words + words, mask=words < num_words, other=0)
    tl.store(count_ptr + row, tl.sum(_popcount(bits), 0).to(tl.int64))


@triton.jit
def threshold_fill_fwd_kernel(
    bits_ptr, z_ptr, offset_ptr, value_ptr, index_ptr, F, num_words, BLOCK_WORDS: tl.constexpr
):
    """Expand one row's bits into values and rising indices from place offset[row] on."""
    row = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, BLOCK_WORDS)
    bits = tl.load(bits_ptr + row * num_words + words, mask=words < num_words, other=0)
    counts = _popcount(bits)
    places = tl.load(offset_ptr + row) + tl.cumsum(counts, 0) - counts
    for bit in range(32):
        is_set = ((bits >> bit) & 1) == 1
        columns = words * 32 + bit
        value = tl.load(z_ptr + row * F + columns, mask=is_set, other=0.0)
        tl.store(index_ptr + places, columns.to(tl.int64), mask=is_set)
        tl.store(value_ptr + places, value, mask=is_set)
        places += is_set.to(tl.int32)


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Primitives.topk`."""
    x, weight, bias = _operands(x, weight, bias)
    num_features = len(weight)
    group_size = group_size_of(num_features, k)
    num_groups = triton.cdiv(num_features, group_size)
    values = x.new_empty(len(x), k, dtype=torch.float32)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for rows, z in _chunks(x, num_features):
        part = x[rows]
        keys = torch.empty(len(part), num_groups, dtype=torch.int32, device=x.device)
        tile = _tile(x.dtype)
        grid = (triton.cdiv(len(part), tile.block_n) * triton.cdiv(num_features, tile.block_f),)
        topk_product_fwd_kernel[grid](
            part, weight, bias, z, keys, len(part), num_features, x.shape[1], num_groups,
            BLOCK_N=tile.block_n, BLOCK_F=tile.block_f, BLOCK_D=tile.block_d, GROUP_SIZE=group_size,
            UPCAST=INTERPRETED, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _select(z, keys, values[rows], indices[rows])
    # The selection yields rising columns; a stable sort by value keeps that order among equals.
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values.relu_(), indices.gather(1, order)


def threshold(x: Tensor, weight: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Primitives.threshold`. Waits for the device once per chunk, to learn the number of entries."""
    x, weight, bias = _operands(x, weight, bias)
    bound = bound.to(torch.float32).contiguous()
    num_features = len(weight)
    num_words = triton.cdiv(num_features, 32)
    block_words = triton.next_power_of_2(num_words)
    pre_acts, indices = [x.new_empty(0, dtype=torch.float32)], [torch.empty(0, dtype=torch.int64, device=x.device)]
    all_counts = [torch.zeros(1, dtype=torch.int64, device=x.device)]
    for rows, z in _chunks(x, num_features):
        part = x[rows]
        bits = torch.empty(len(part), num_words, dtype=torch.int32, device=x.device)
        tile = _tile(x.dtype)
        grid = (triton.cdiv(len(part), tile.block_n) * triton.cdiv(num_features, tile.block_f),)
        threshold_product_fwd_kernel[grid](
            part, weight, bias, bound, z, bits, len(part), num_features, x.shape[1], num_words,
            BLOCK_N=tile.block_n, BLOCK_F=tile.block_f, BLOCK_D=tile.block_d,
            UPCAST=INTERPRETED, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        counts = torch.empty(len(part), dtype=torch.int64, device=x.device)
        threshold_count_fwd_kernel[(len(part),)](bits, counts, num_words, BLOCK_WORDS=block_words)
        ends = counts.cumsum(0)
        starts, num_entries = ends - counts, int(ends[-1])
        pre_acts.append(x.new_empty(num_entries, dtype=torch.float32))
        indices.append(torch.empty(num_entries, dtype=torch.int64, device=x.device))
        threshold_fill_fwd_kernel[(len(part),)](
            bits, z, starts, pre_acts[-1], indices[-1], num_features, num_words,
            BLOCK_WORDS=block_words, num_warps=fill_warps(block_words),
        )  # fmt: skip
        all_counts.append(counts)
    return torch.cat(pre_acts), torch.cat(indices), torch.cat(all_counts).cumsum(0)


def group_size_of(num_features: int, k: int) -> int:
    """Columns per group: near sqrt(F / k), where group keys plus candidates are fewest, a power of two from 4 to 32."""
    group_size = 32
    while group_size > 4 and group_size * group_size * k > 2 * num_features:
        group_size //= 2
    return group_size


def fill_warps(block_words: int) -> int:
    """Warps of `threshold_fill_fwd_kernel`: at most 8 words a thread, or it spills."""
    return min(16, max(4, block_words // 256))


def selection_launch(num_features: int, k: int) -> tuple[dict[str, int], int]:
    """Constants and warps of `topk_select_fwd_kernel`."""
    group_size = group_size_of(num_features, k)
    num_groups = int(triton.cdiv(num_features, group_size))
    num_best = min(k, num_groups)
    constants = {
        "K": k,
        "NUM_BEST": num_best,
        "BLOCK_BEST": int(triton.next_power_of_2(num_best)),
        "GROUP_SIZE": group_size,
        "BLOCK_GROUPS": int(triton.next_power_of_2(num_groups)),
    }
    held = max(constants["BLOCK_GROUPS"], constants["BLOCK_BEST"] * group_size)
    return constants, 4 if held <= 2048 else 8 if held <= 8192 else 16


def _select(z: Tensor, keys: Tensor, values: Tensor, indices: Tensor) -> None:
    """Write the k largest of each row of z to `values` and `indices` [B, k], by rising column."""
    k, num_groups = values.shape[1], keys.shape[1]
    constants, num_warps = selection_launch(z.shape[1], k)
    if max(constants["BLOCK_GROUPS"], constants["BLOCK_BEST"] * constants["GROUP_SIZE"]) > MAX_SELECTED_FROM:
        order = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        indices.copy_(order)
        values.copy_(z.gather(1, order))
        return
    scratch = torch.empty(len(z), constants["NUM_BEST"], dtype=torch.int32, device=z.device)
    topk_select_fwd_kernel[(len(z),)](
        z, keys, scratch, values, indices, z.shape[1], num_groups, **constants, num_warps=num_warps
    )


def _operands(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype).contiguous(), weight.to(dtype).contiguous(), bias.contiguous()


def _tile(dtype: torch.dtype) -> Tile:
    if INTERPRETED:
        return _INTERPRETED_TILE
    return FLOAT_TILE if dtype == torch.float32 else HALF_TILE


def _chunks(x: Tensor, num_features: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, uninitialised z [rows, F] float32) over all rows of x; the memory of z is reused."""
    fitting = _CHUNK_BYTES // (4 * num_features) // _CHUNK_ROWS_STEP * _CHUNK_ROWS_STEP
    num_rows = min(len(x), max(_CHUNK_ROWS_STEP, fitting))
    buffer = x.new_empty(num_rows, num_features, dtype=torch.float32)
    for start in range(0, len(x), max(num_rows, 1)):
        stop = min(start + num_rows, len(x))
        yield slice(start, stop), buffer[: stop - start]
