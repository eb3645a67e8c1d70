# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""Top-k encoder in Triton in two kernels: the product, whose epilogue prepares the selection, and the selection of a row.

The epilogue writes z and, per group of G columns, the largest sort key. The k largest entries of a row lie in the k groups with
the largest keys (equal keys: lowest group first), so the second kernel finds those groups by bisection on integer keys, reads
k * G values and bisects again: exact, ties included, with no sort of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels._product_triton import INTERPRETED, chunks, operands, product, sort_key, tile_for, tile_of

_INT32_MIN = tl.constexpr(-(2**31))
_INT32_MAX = tl.constexpr(2**31 - 1)
# Keys that one program of the selection can hold in registers; past it, torch sorts the rows of z.
MAX_SELECTED_FROM = 16384


@triton.jit
def group_keys(keys, columns, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The largest key of each GROUP_SIZE columns of a tile: [BLOCK_N, BLOCK_F / GROUP_SIZE]."""
    keys = tl.where((columns < F)[None, :], keys, _INT32_MIN)
    return tl.max(tl.reshape(keys, (BLOCK_N, BLOCK_F // GROUP_SIZE, GROUP_SIZE)), axis=2)


@triton.jit
def topk_product_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, z_ptr, group_key_ptr, N, F, D, num_groups,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_SIZE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z [N, F] float32, and the largest sort key of each GROUP_SIZE columns [N, num_groups]."""
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), 8)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_F + tl.arange(0, BLOCK_F)
    z = product(x_ptr, weight_ptr, bias_ptr, rows, columns, N, F, D, BLOCK_N, BLOCK_F, BLOCK_D, UPCAST)
    is_inside = (rows < N)[:, None] & (columns < F)[None, :]
    tl.store(z_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], z, mask=is_inside)
    keys = group_keys(sort_key(z), columns, F, BLOCK_N, BLOCK_F, GROUP_SIZE)
    groups = column_block * (BLOCK_F // GROUP_SIZE) + tl.arange(0, BLOCK_F // GROUP_SIZE)
    is_group = (rows < N)[:, None] & (groups < num_groups)[None, :]
    tl.store(group_key_ptr + rows.to(tl.int64)[:, None] * num_groups + groups[None, :], keys, mask=is_group)


@triton.jit
def kth_key(keys, is_valid, K: tl.constexpr):
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
    """The K valid places with the largest keys, lowest place first among equals, given `kth_key`."""
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
    keys_of_groups = tl.load(group_key_ptr + row * num_groups + groups, mask=is_group, other=_INT32_MIN)
    is_best = _first_k(keys_of_groups, is_group, kth_key(keys_of_groups, is_group, NUM_BEST), NUM_BEST)
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
    keys = sort_key(z)
    is_chosen = _first_k(keys, is_column, kth_key(keys, is_column, K), K)
    places = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(index_ptr + row * K + places, columns.to(tl.int64), mask=is_chosen)
    tl.store(value_ptr + row * K + places, z, mask=is_chosen)


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Primitives.topk`."""
    x, weight, bias = operands(x, weight, bias)
    num_features = len(weight)
    group_size = group_size_of(num_features, k)
    num_groups = triton.cdiv(num_features, group_size)
    values = x.new_empty(len(x), k, dtype=torch.float32)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for rows, z in chunks(x, num_features):
        part = x[rows]
        keys = torch.empty(len(part), num_groups, dtype=torch.int32, device=x.device)
        tile = tile_for(x.dtype)
        grid = (triton.cdiv(len(part), tile.block_n) * triton.cdiv(num_features, tile.block_f),)
        topk_product_fwd_kernel[grid](
            part, weight, bias, z, keys, len(part), num_features, x.shape[1], num_groups,
            BLOCK_N=tile.block_n, BLOCK_F=tile.block_f, BLOCK_D=tile.block_d, GROUP_SIZE=group_size,
            UPCAST=INTERPRETED, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        select(z, keys, values[rows], indices[rows])
    # The selection yields rising columns; a stable sort by value keeps that order among equals.
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values.relu_(), indices.gather(1, order)


def group_size_of(num_features: int, k: int) -> int:
    """Columns per group: near sqrt(F / k), where group keys plus candidates are fewest, a power of two from 4 to 32."""
    group_size = 32
    while group_size > 4 and group_size * group_size * k > 2 * num_features:
        group_size //= 2
    return group_size


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


def select(z: Tensor, keys: Tensor, values: Tensor, indices: Tensor) -> None:
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
