# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""The matrix product that every encoder in Triton begins with: tiles, their order, sort keys, and chunks of rows.

Chunks bound what an encoder's intermediate arrays take, whatever N is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Interpreted, tl.dot multiplies the raw bits of bfloat16 (triton-lang/triton#11584: not supported); operands are widened.
INTERPRETED = triton.knobs.runtime.interpret

# Of pre-activations at a time: what a step needs beside its weights stays small, and a chunk of 1024 rows of 65,536 features
# still fills every multiprocessor 30 times over.
_CHUNK_BYTES = 1 << 28
# A multiple of the row block, so that no chunk but the last leaves part of one idle.
_CHUNK_ROWS_STEP = 128
_INT32_MAX = tl.constexpr(2**31 - 1)


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
def tile_of(program, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Row and column block of a program; GROUP row blocks share each column block, so that both stay in L2."""
    width = GROUP * num_column_blocks
    group = program // width
    first = group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    return first + (program % width) % size, (program % width) // size


@triton.jit
def product(
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
def sort_key(value):
    """int32 that orders as the float32 does, NaN above everything; -0 must have become +0."""
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ _INT32_MAX, bits)
    return tl.where(value != value, _INT32_MAX, key)


def operands(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype).contiguous(), weight.to(dtype).contiguous(), bias.contiguous()


def tile_for(dtype: torch.dtype) -> Tile:
    if INTERPRETED:
        return _INTERPRETED_TILE
    return FLOAT_TILE if dtype == torch.float32 else HALF_TILE


def chunks(x: Tensor, num_features: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, uninitialised z [rows, F] float32) over all rows of x; the memory of z is reused."""
    buffer: Tensor | None = None
    for rows in row_slices(len(x), 4 * num_features):
        if buffer is None:
            buffer = x.new_empty(rows.stop - rows.start, num_features, dtype=torch.float32)
        yield rows, buffer[: rows.stop - rows.start]


def row_slices(num_rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of rows that together take a bounded amount of memory, the first the longest."""
    fitting = _CHUNK_BYTES // row_bytes // _CHUNK_ROWS_STEP * _CHUNK_ROWS_STEP
    size = max(_CHUNK_ROWS_STEP, fitting)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
