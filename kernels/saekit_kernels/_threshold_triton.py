# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""Threshold encoder in Triton: the product's epilogue packs z > bound into one bit per entry and writes z only where it is set.

Two small kernels count the bits and expand them into CSR.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels._product_triton import INTERPRETED, chunks, operands, product, tile_for, tile_of


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def threshold_product_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, bound_ptr, z_ptr, bits_ptr, N, F, D, num_words,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Bit f % 32 of bits [N, num_words] is set where z is not <= bound; z [N, F] is written only there."""
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), 8)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_F + tl.arange(0, BLOCK_F)
    z = product(x_ptr, weight_ptr, bias_ptr, rows, columns, N, F, D, BLOCK_N, BLOCK_F, BLOCK_D, UPCAST)
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


def threshold(x: Tensor, weight: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Primitives.threshold`. Waits for the device once per chunk, to learn the number of entries."""
    x, weight, bias = operands(x, weight, bias)
    bound = bound.to(torch.float32).contiguous()
    num_features = len(weight)
    num_words = triton.cdiv(num_features, 32)
    block_words = triton.next_power_of_2(num_words)
    pre_acts, indices = [x.new_empty(0, dtype=torch.float32)], [torch.empty(0, dtype=torch.int64, device=x.device)]
    all_counts = [torch.zeros(1, dtype=torch.int64, device=x.device)]
    for rows, z in chunks(x, num_features):
        part = x[rows]
        bits = torch.empty(len(part), num_words, dtype=torch.int32, device=x.device)
        tile = tile_for(x.dtype)
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


def fill_warps(block_words: int) -> int:
    """Warps of `threshold_fill_fwd_kernel`: at most 8 words a thread, or it spills."""
    return min(16, max(4, block_words // 256))
