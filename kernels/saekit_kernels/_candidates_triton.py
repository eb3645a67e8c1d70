# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""Candidates of top-k in Triton: rows to eight bits, products on the 8-bit tensor cores, and upper bounds in their epilogue.

The bounds are selected from as pre-activations are (`_encode_triton`), chunk by chunk of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels._encode_triton import group_keys, group_size_of, select
from saekit_kernels._optim_triton import MAX_ROW, launch
from saekit_kernels._product_triton import INTERPRETED, Tile, chunks, sort_key, tile_of
from saekit_kernels._quantize import (
    DTYPES,
    LARGEST,
    MAX_NORM,
    TINY,
    Kind,
    Quantized,
    feature_bias,
    quantize,
    round_up,
    token_margin,
)

# 8-bit operands: 128 elements of the inner dimension are as many bytes as 64 of 16 bits.
BYTE_TILE = Tile(128, 128, 128, 8, 3)
_INTERPRETED_TILE = Tile(16, 32, 32, 4, 1)
_MAX_NORM = tl.constexpr(MAX_NORM)


@triton.jit
def quantize_fwd_kernel(
    row_ptr, code_ptr, scale_ptr, norm_ptr, rest_ptr, left_out_ptr, D, up, floor,
    LARGEST: tl.constexpr, IS_INTEGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row as `quantize` of `_quantize` gives it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < D
    values = tl.load(row_ptr + row * D + columns, mask=is_inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    relative = values / tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    # What is not finite is not scored, whatever its codes are.
    scaled = tl.where(tl.abs(relative) <= 1.0, relative, 0.0) * LARGEST
    # Away from zero at halves, where torch rounds to even: the rest is measured, so either is right.
    nearest = tl.where(scaled < 0, scaled - 0.5, scaled + 0.5)
    codes = nearest.to(tl.int8) if IS_INTEGER else scaled.to(tl.float8e4nv)
    tl.store(code_ptr + row * D + columns, codes, mask=is_inside)
    left = relative - codes.to(tl.float32) / LARGEST
    norm = largest * tl.sqrt(tl.sum(relative * relative, 0)) * up + floor
    rest = largest * tl.sqrt(tl.sum(tl.where(is_inside, left * left, 0.0), 0)) * up + norm * 2.384185791015625e-07
    is_scored = norm < _MAX_NORM
    tl.store(scale_ptr + row, tl.where(is_scored, largest / LARGEST, 0.0))
    tl.store(norm_ptr + row, tl.where(is_scored, norm, 0.0))
    tl.store(rest_ptr + row, tl.where(is_scored, rest, 0.0))
    tl.store(left_out_ptr + row, tl.where(is_scored, 0, 1).to(tl.int8))


@triton.jit
def bound_product_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, x_scale_ptr, x_size_ptr, x_margin_ptr, weight_scale_ptr, weight_rest_ptr, weight_norm_ptr,
    z_ptr, group_key_ptr, N, F, D, num_groups,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr,
    IS_INTEGER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Upper bounds z [N, F] float32 of the pre-activations, and the largest sort key of each GROUP_SIZE columns."""
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), 8)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_F + tl.arange(0, BLOCK_F)
    inner = tl.arange(0, BLOCK_D)
    safe_rows = tl.where(rows < N, rows, 0).to(tl.int64)
    safe_columns = tl.where(columns < F, columns, 0).to(tl.int64)
    x_ptrs = x_ptr + safe_rows[:, None] * D + inner[None, :]
    weight_ptrs = weight_ptr + safe_columns[None, :] * D + inner[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.int32 if IS_INTEGER else tl.float32)
    for start in range(0, D, BLOCK_D):
        a = tl.load(x_ptrs, mask=inner[None, :] < D - start, other=0.0)
        b = tl.load(weight_ptrs, mask=inner[:, None] < D - start, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32 if IS_INTEGER else tl.float32)
        x_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    z = acc.to(tl.float32) * (
        tl.load(x_scale_ptr + safe_rows)[:, None] * tl.load(weight_scale_ptr + safe_columns)[None, :]
    )
    z += tl.load(x_size_ptr + safe_rows)[:, None] * tl.load(weight_rest_ptr + safe_columns)[None, :]
    z += tl.load(x_margin_ptr + safe_rows)[:, None] * tl.load(weight_norm_ptr + safe_columns)[None, :]
    z += tl.load(bias_ptr + safe_columns)[None, :]
    # As in the plain product: no -0.
    z += 0.0
    is_inside = (rows < N)[:, None] & (columns < F)[None, :]
    tl.store(z_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], z, mask=is_inside)
    groups = column_block * (BLOCK_F // GROUP_SIZE) + tl.arange(0, BLOCK_F // GROUP_SIZE)
    is_group = (rows < N)[:, None] & (groups < num_groups)[None, :]
    keys = group_keys(sort_key(z), columns, F, BLOCK_N, BLOCK_F, GROUP_SIZE)
    tl.store(group_key_ptr + rows.to(tl.int64)[:, None] * num_groups + groups[None, :], keys, mask=is_group)


def candidates(x: Tensor, weight: Tensor, bias: Tensor, count: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """See `Primitives.candidates`."""
    num_features = len(weight)
    tokens, features = _quantize_rows(x.contiguous(), kind), _quantize_rows(weight.contiguous(), kind)
    raised = feature_bias(bias.to(torch.float32), features)
    size, margin = tokens.norm + tokens.rest, token_margin(tokens, kind)
    group_size = group_size_of(num_features, count)
    num_groups = triton.cdiv(num_features, group_size)
    bounds = torch.empty(len(x), count, dtype=torch.float32, device=x.device)
    columns = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    tile = _INTERPRETED_TILE if INTERPRETED else BYTE_TILE
    for rows, z in chunks(x, num_features):
        keys = torch.empty(len(z), num_groups, dtype=torch.int32, device=x.device)
        grid = (triton.cdiv(len(z), tile.block_n) * triton.cdiv(num_features, tile.block_f),)
        bound_product_fwd_kernel[grid](
            tokens.codes[rows], features.codes, raised, tokens.scale[rows], size[rows], margin[rows],
            features.scale, features.rest, features.norm, z, keys, len(z), num_features, x.shape[1], num_groups,
            BLOCK_N=tile.block_n, BLOCK_F=tile.block_f, BLOCK_D=tile.block_d, GROUP_SIZE=group_size,
            IS_INTEGER=kind == "int8", UPCAST=INTERPRETED and kind == "fp8", num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        select(z, keys, bounds[rows], columns[rows])
    return columns, torch.where(tokens.is_left_out, torch.inf, bounds.amin(1))


def _quantize_rows(rows: Tensor, kind: Kind) -> Quantized:
    num_rows, d_in = rows.shape
    if d_in > MAX_ROW:
        return quantize(rows.to(torch.float32), kind)
    codes = torch.empty(rows.shape, dtype=DTYPES[kind], device=rows.device)
    scale, norm, rest = torch.empty(3, num_rows, dtype=torch.float32, device=rows.device)
    is_left_out = torch.empty(num_rows, dtype=torch.bool, device=rows.device)
    block, num_warps = launch(d_in)
    if num_rows:
        quantize_fwd_kernel[(num_rows,)](
            rows, codes, scale, norm, rest, is_left_out.view(torch.int8), d_in, round_up(d_in), TINY * d_in**0.5,
            LARGEST=LARGEST[kind], IS_INTEGER=kind == "int8", BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return Quantized(codes, scale, norm, rest, is_left_out)
