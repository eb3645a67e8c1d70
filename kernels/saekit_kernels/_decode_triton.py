# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""Sparse sums in Triton: gathers by token, and sums by feature from the reverse index.

No atomics anywhere: every sum has one fixed order, so results are bit-reproducible. A feature with more than
MAX_ENTRIES entries is cut into work items whose partial rows a second kernel adds in order, so that one feature that
fires on every token does not become one long program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels import _dense
from saekit_kernels._product_triton import INTERPRETED
from saekit_kernels.sparse_code import Entries, ReverseIndex

MAX_ENTRIES = 256
BLOCK_ENTRIES = 16
# From this density on a matrix product is cheaper than gathers through the second-level cache (modelled, not measured; AuxK comes
# here). Interpreted, the kernels are wanted.
MIN_DENSITY = 2.0 if INTERPRETED else 0.01


@triton.jit
def gather_sum_fwd_kernel(
    value_ptr, index_ptr, offset_ptr, weight_ptr, bias_ptr, out_ptr, D,
    HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n] = sum of value * weight[index] over the row's entries (+ bias): one row, one block of columns."""
    # Rows run fastest: all programs read one column block of the weight at a time, which stays in L2.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < D
    first, last = tl.load(offset_ptr + row), tl.load(offset_ptr + row + 1)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(first, last, BLOCK_E):
        entries = start + tl.arange(0, BLOCK_E)
        is_entry = entries < last
        value = tl.load(value_ptr + entries, mask=is_entry, other=0.0).to(tl.float32)
        index = tl.load(index_ptr + entries, mask=is_entry, other=0).to(tl.int64)
        is_inside = is_entry[:, None] & is_column[None, :]
        weight = tl.load(weight_ptr + index[:, None] * D + columns[None, :], mask=is_inside, other=0.0)
        acc += tl.sum(weight.to(tl.float32) * value[:, None], 0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + columns, acc.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def gather_dot_bwd_kernel(
    row_ptr, index_ptr, offset_ptr, weight_ptr, out_ptr, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[e] = <rows[n], weight[index[e]]> for the entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offset_ptr + row), tl.load(offset_ptr + row + 1)
    for start in range(first, last, BLOCK_E):
        entries = start + tl.arange(0, BLOCK_E)
        is_entry = entries < last
        index = tl.load(index_ptr + entries, mask=is_entry, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_E,), dtype=tl.float32)
        for column_start in range(0, D, BLOCK_D):
            columns = column_start + tl.arange(0, BLOCK_D)
            is_column = columns < D
            value = tl.load(row_ptr + row * D + columns, mask=is_column, other=0.0).to(tl.float32)
            is_inside = is_entry[:, None] & is_column[None, :]
            weight = tl.load(weight_ptr + index[:, None] * D + columns[None, :], mask=is_inside, other=0.0)
            acc += tl.sum(weight.to(tl.float32) * value[None, :], 1)
        tl.store(out_ptr + entries, acc.to(out_ptr.dtype.element_ty), mask=is_entry)


@triton.jit
def scatter_sum_bwd_kernel(
    value_ptr, order_ptr, entry_row_ptr, offset_ptr, item_feature_ptr, item_offset_ptr, slot_offset_ptr,
    row_ptr, partial_ptr, out_ptr, F, D, MAX_ENTRIES: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One work item (at most MAX_ENTRIES entries of one feature), one block of columns.

    A feature of one item goes straight to out [F, D]; the items of a larger one leave partial rows [slots, D].
    """
    item = tl.program_id(0).to(tl.int64)
    feature = tl.load(item_feature_ptr + item).to(tl.int64)
    if feature < F:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        is_column = columns < D
        first, last = tl.load(offset_ptr + feature), tl.load(offset_ptr + feature + 1)
        part = item - tl.load(item_offset_ptr + feature)
        item_first = first + part * MAX_ENTRIES
        item_last = tl.minimum(item_first + MAX_ENTRIES, last)
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(item_first, item_last, BLOCK_E):
            places = start + tl.arange(0, BLOCK_E)
            is_entry = places < item_last
            entry = tl.load(order_ptr + places, mask=is_entry, other=0)
            row = tl.load(entry_row_ptr + places, mask=is_entry, other=0)
            value = tl.load(value_ptr + entry, mask=is_entry, other=0.0).to(tl.float32)
            is_inside = is_entry[:, None] & is_column[None, :]
            rows = tl.load(row_ptr + row[:, None] * D + columns[None, :], mask=is_inside, other=0.0)
            acc += tl.sum(rows.to(tl.float32) * value[:, None], 0)
        if last - first > MAX_ENTRIES:
            slot = tl.load(slot_offset_ptr + feature) + part
            tl.store(partial_ptr + slot * D + columns, acc, mask=is_column)
        else:
            tl.store(out_ptr + feature * D + columns, acc.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def combine_bwd_kernel(
    hot_ptr, slot_offset_ptr, partial_ptr, out_ptr, D, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the partial rows of one feature that was cut into items, in order; other features are left alone."""
    feature = tl.load(hot_ptr + tl.program_id(0)).to(tl.int64)
    first, last = tl.load(slot_offset_ptr + feature), tl.load(slot_offset_ptr + feature + 1)
    if last > first:
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        is_column = columns < D
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(first, last, BLOCK_I):
            slots = start + tl.arange(0, BLOCK_I)
            is_inside = (slots < last)[:, None] & is_column[None, :]
            acc += tl.sum(tl.load(partial_ptr + slots[:, None] * D + columns[None, :], mask=is_inside, other=0.0), 0)
        tl.store(out_ptr + feature * D + columns, acc.to(out_ptr.dtype.element_ty), mask=is_column)


def gather_sum(
    values: Tensor, entries: Entries, weight: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """See `Primitives.gather_sum`."""
    if _is_dense(entries, len(weight)):
        out = _dense.gather_sum(values.reshape(-1).float(), entries, weight.float())
        return (out if bias is None else out + bias).to(dtype)
    values, weight = values.contiguous(), weight.contiguous()
    num_columns = weight.shape[1]
    out = weight.new_empty(entries.num_rows, num_columns, dtype=dtype)
    block = block_columns(num_columns)
    if out.numel():
        gather_sum_fwd_kernel[(entries.num_rows, triton.cdiv(num_columns, block))](
            values, entries.indices, entries.row_offsets, weight,
            weight if bias is None else bias.contiguous(), out, num_columns,
            HAS_BIAS=bias is not None, BLOCK_E=BLOCK_ENTRIES, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    return out


def gather_dot(rows: Tensor, entries: Entries, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.gather_dot`."""
    if _is_dense(entries, len(weight)):
        return _dense.gather_dot(rows.float(), entries, weight.float()).to(dtype)
    rows, weight = rows.contiguous(), weight.contiguous()
    num_columns = weight.shape[1]
    out = weight.new_empty(entries.indices.numel(), dtype=dtype)
    if out.numel():
        gather_dot_bwd_kernel[(entries.num_rows,)](
            rows, entries.indices, entries.row_offsets, weight, out, num_columns,
            BLOCK_E=BLOCK_ENTRIES, BLOCK_D=block_columns(num_columns), num_warps=4,
        )  # fmt: skip
    return out


def scatter_sum(values: Tensor, reverse: ReverseIndex, rows: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.scatter_sum`."""
    if _is_dense(reverse.entries, reverse.num_features):
        values, rows = values.reshape(-1).float(), rows.float()
        return _dense.scatter_sum(values, reverse.entries, reverse.num_features, rows).to(dtype)
    values, rows = values.contiguous(), rows.contiguous()
    num_features, num_columns, num_entries = reverse.num_features, rows.shape[1], values.numel()
    out = rows.new_empty(num_features, num_columns, dtype=dtype)
    counts = reverse.offsets.diff()
    num_parts = (counts + MAX_ENTRIES - 1) // MAX_ENTRIES
    item_offsets = _starts(num_parts.clamp(min=1))
    slot_offsets = _starts(torch.where(num_parts > 1, num_parts, 0))
    # Bounds known without waiting for the device: fewer than `num_full` features have more than one part, so there are
    # at most that many more items than features, and twice that many slots.
    num_full = num_entries // MAX_ENTRIES
    items = torch.arange(num_features + num_full, device=rows.device)
    # Items past the last feature get number F, and their programs end at once.
    item_features = torch.searchsorted(item_offsets[1:], items, right=True)
    partial = rows.new_empty(2 * num_full, num_columns, dtype=torch.float32)
    block = block_columns(num_columns)
    num_blocks = triton.cdiv(num_columns, block)
    scatter_sum_bwd_kernel[(len(items), num_blocks)](
        values, reverse.order, reverse.rows, reverse.offsets, item_features, item_offsets, slot_offsets,
        rows, partial, out, num_features, num_columns,
        MAX_ENTRIES=MAX_ENTRIES, BLOCK_E=BLOCK_ENTRIES, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    if num_full:
        hot = torch.topk(counts, min(num_full, num_features), sorted=False).indices
        combine_bwd_kernel[(len(hot), num_blocks)](
            hot, slot_offsets, partial, out, num_columns, BLOCK_I=BLOCK_ENTRIES, BLOCK_D=block, num_warps=4
        )
    return out


def feature_sum(values: Tensor, reverse: ReverseIndex, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.feature_sum`."""
    # index_add_ would add atomically, in any order; this walks each feature's entries.
    ordered = values.reshape(-1).to(torch.float32)[reverse.order]
    # unsafe: the offsets are ours, and checking them would wait for the device.
    return torch.segment_reduce(ordered, "sum", offsets=reverse.offsets, initial=0.0, unsafe=True).to(dtype)


def block_columns(num_columns: int) -> int:
    """Columns per program: all of a narrow row, 256 of a wide one."""
    return min(256, max(16, int(triton.next_power_of_2(num_columns))))


def _is_dense(entries: Entries, num_features: int) -> bool:
    """Whether products of blocks of rows are the faster sums, and neither wait for the device nor add in any order."""
    is_possible = entries.is_unique and entries.width is not None
    return is_possible and _dense.is_dense(entries, num_features, min_density=MIN_DENSITY)


def _starts(counts: Tensor) -> Tensor:
    """[n + 1] int64: the running sum of counts [n], from 0."""
    starts = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts
