# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""Top-k encoder in Triton that never writes a pre-activation: the product keeps the two largest of every 32 columns.

With T the k-th largest of all that is kept, a group hides an entry that could be wanted only where its second is above T, or
equal to it and before the last tie that is taken: at most (k + 1) / 2 groups a row. The selection computes those 32 columns
again, leaves out the two that it has, and selects once more: exact for every input, ties by lowest index, without waiting for
the device. An entry that is computed again is summed in another order, so features whose pre-activations differ by less than
the rounding of float32 may change places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels._encode_triton import MAX_SELECTED_FROM, kth_key
from saekit_kernels._product_triton import INTERPRETED, operands, product, row_slices, sort_key, tile_for, tile_of

GROUP = 32
# Columns of the inner dimension that the selection reads at a time.
BLOCK_D = 128
# Bytes a row and group: two keys and two lanes.
_GROUP_BYTES = 10
_GROUP = tl.constexpr(GROUP)
_INT32_MIN = tl.constexpr(-(2**31))
_INT32_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def top2_product_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, key_ptr, lane_ptr, N, F, D, num_groups,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sort keys of the two largest of every 32 columns [N, num_groups, 2], and their lanes [N, num_groups] as l1 + 32 l2.

    The key of a column that does not exist is the smallest integer, which no number has.
    """
    row_block, column_block = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F), 8)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_F + tl.arange(0, BLOCK_F)
    z = product(x_ptr, weight_ptr, bias_ptr, rows, columns, N, F, D, BLOCK_N, BLOCK_F, BLOCK_D, UPCAST)
    keys = tl.where((columns < F)[None, :], sort_key(z), _INT32_MIN)
    keys = tl.reshape(keys, (BLOCK_N, BLOCK_F // _GROUP, _GROUP))
    lanes = tl.arange(0, _GROUP)[None, None, :]
    first = tl.max(keys, axis=2)
    first_lane = tl.min(tl.where(keys == first[:, :, None], lanes, _GROUP - 1), axis=2)
    keys = tl.where(lanes == first_lane[:, :, None], _INT32_MIN, keys)
    second = tl.max(keys, axis=2)
    second_lane = tl.min(tl.where(keys == second[:, :, None], lanes, _GROUP - 1), axis=2)
    groups = column_block * (BLOCK_F // _GROUP) + tl.arange(0, BLOCK_F // _GROUP)
    is_group = (rows < N)[:, None] & (groups < num_groups)[None, :]
    places = rows.to(tl.int64)[:, None] * num_groups + groups[None, :]
    tl.store(key_ptr + places * 2, first, mask=is_group)
    tl.store(key_ptr + places * 2 + 1, second, mask=is_group)
    tl.store(lane_ptr + places, (first_lane + _GROUP * second_lane).to(tl.int16), mask=is_group)


@triton.jit
def _dot_keys(x_row_ptr, weight_ptr, bias_ptr, columns, F, D, BLOCK_D: tl.constexpr):
    """Sort keys of the pre-activations of a few columns of one row."""
    is_column = columns < F
    acc = tl.zeros((_GROUP,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_row_ptr + inner, mask=inner < D, other=0.0).to(tl.float32)
        is_inside = is_column[:, None] & (inner < D)[None, :]
        weight = tl.load(weight_ptr + columns.to(tl.int64)[:, None] * D + inner[None, :], mask=is_inside, other=0.0)
        acc += tl.sum(weight.to(tl.float32) * x[None, :], 1)
    acc += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    return tl.where(is_column, sort_key(acc + 0.0), _INT32_MIN)


@triton.jit
def _kth_key_of_both(kept, hidden, low, K: tl.constexpr):
    """As `kth_key` over two arrays, from a key that at least K are not below of; missing entries hold the smallest integer."""
    high = tl.maximum(tl.max(kept, 0), tl.max(hidden, 0))
    count = tl.sum((kept >= low).to(tl.int32), 0) + tl.sum((hidden >= low).to(tl.int32), 0)
    while (low < high) & (count != K):
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        above = tl.sum((kept >= middle).to(tl.int32), 0) + tl.sum((hidden >= middle).to(tl.int32), 0)
        is_enough = above >= K
        low = tl.where(is_enough, middle, low)
        count = tl.where(is_enough, above, count)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def _last_column(is_tied, columns, is_tied_hidden, hidden_columns, num_wanted, F):
    """The column up to which ties are taken, so that `num_wanted` of them are."""
    num_tied = tl.sum(is_tied.to(tl.int32), 0) + tl.sum(is_tied_hidden.to(tl.int32), 0)
    high = F - 1
    low = tl.where(num_tied == num_wanted, high, 0)
    while low < high:
        middle = (low + high) // 2
        count = tl.sum((is_tied & (columns <= middle)).to(tl.int32), 0)
        count += tl.sum((is_tied_hidden & (hidden_columns <= middle)).to(tl.int32), 0)
        is_enough = count >= num_wanted
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle + 1)
    return low


@triton.jit
def _packed(keys, columns):
    """int64 that orders by key, the lowest column first among equals when it falls."""
    return (keys.to(tl.int64) << 32) + (_INT32_MAX - columns)


@triton.jit
def top2_select_fwd_kernel(
    key_ptr, lane_ptr, x_ptr, weight_ptr, bias_ptr, group_ptr, hidden_ptr, out_ptr, F, D, num_groups,
    K: tl.constexpr, MOST: tl.constexpr, BLOCK_MOST: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The K largest of one row, packed, in no order. At most MOST groups are computed again."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, 2 * BLOCK_GROUPS)
    is_slot = slots < 2 * num_groups
    keys = tl.load(key_ptr + row * 2 * num_groups + slots, mask=is_slot, other=_INT32_MIN)
    lanes = tl.load(lane_ptr + row * num_groups + slots // 2, mask=is_slot, other=0).to(tl.int32)
    columns = slots // 2 * _GROUP + tl.where(slots % 2 == 0, lanes % _GROUP, lanes // _GROUP)
    edge = kth_key(keys, keys != _INT32_MIN, K)

    num_wanted = K - tl.sum((keys > edge).to(tl.int32), 0)
    is_tied = keys == edge
    ties = is_tied.to(tl.int32)
    # Ties before the group: those before the place, less that of the group's own first.
    ties_before = tl.cumsum(ties, 0) - ties
    first_is_tied = (
        tl.load(key_ptr + row * 2 * num_groups + slots - 1, mask=is_slot & (slots % 2 == 1), other=0) == edge
    )
    ties_before -= (first_is_tied & (slots % 2 == 1)).to(tl.int32)
    is_open = (slots % 2 == 1) & ((keys > edge) | (is_tied & (ties_before < num_wanted)))
    num_open = tl.sum(is_open.to(tl.int32), 0)
    tl.store(group_ptr + row * MOST + tl.cumsum(is_open.to(tl.int32), 0) - 1, slots // 2, mask=is_open)
    tl.debug_barrier()
    lane = tl.arange(0, _GROUP)
    for number in range(num_open):
        group = tl.load(group_ptr + row * MOST + number)
        known = tl.load(lane_ptr + row * num_groups + group).to(tl.int32)
        found = _dot_keys(x_ptr + row * D, weight_ptr, bias_ptr, group * _GROUP + lane, F, D, BLOCK_D)
        is_known = (lane == known % _GROUP) | (lane == known // _GROUP)
        tl.store(hidden_ptr + (row * MOST + number) * _GROUP + lane, tl.where(is_known, _INT32_MIN, found))
    tl.debug_barrier()
    places = tl.arange(0, BLOCK_MOST * _GROUP)
    is_place = places < num_open * _GROUP
    hidden = tl.load(hidden_ptr + row * MOST * _GROUP + places, mask=is_place, other=_INT32_MIN)
    hidden_groups = tl.load(group_ptr + row * MOST + places // _GROUP, mask=is_place, other=0)
    hidden_columns = hidden_groups * _GROUP + places % _GROUP

    edge = _kth_key_of_both(keys, hidden, edge, K)
    num_wanted = K - tl.sum((keys > edge).to(tl.int32), 0) - tl.sum((hidden > edge).to(tl.int32), 0)
    last = _last_column(keys == edge, columns, hidden == edge, hidden_columns, num_wanted, F)
    is_chosen = (keys > edge) | ((keys == edge) & (columns <= last))
    tl.store(out_ptr + row * K + tl.cumsum(is_chosen.to(tl.int32), 0) - 1, _packed(keys, columns), mask=is_chosen)
    num_chosen = tl.sum(is_chosen.to(tl.int32), 0)
    is_chosen = (hidden > edge) | ((hidden == edge) & (hidden_columns <= last))
    to = num_chosen + tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(out_ptr + row * K + to, _packed(hidden, hidden_columns), mask=is_chosen)


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Primitives.topk`, for shapes that `is_possible`."""
    x, weight, bias = operands(x, weight, bias)
    num_features, d_in = weight.shape
    num_groups = triton.cdiv(num_features, GROUP)
    constants, num_warps = selection_launch(num_features, k)
    tile = tile_for(x.dtype)
    packed = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for rows in row_slices(len(x), _GROUP_BYTES * num_groups):
        part = x[rows]
        keys = torch.empty(len(part), num_groups, 2, dtype=torch.int32, device=x.device)
        lanes = torch.empty(len(part), num_groups, dtype=torch.int16, device=x.device)
        grid = (triton.cdiv(len(part), tile.block_n) * triton.cdiv(num_features, tile.block_f),)
        top2_product_fwd_kernel[grid](
            part, weight, bias, keys, lanes, len(part), num_features, d_in, num_groups,
            BLOCK_N=tile.block_n, BLOCK_F=tile.block_f, BLOCK_D=tile.block_d,
            UPCAST=INTERPRETED, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        groups = torch.empty(len(part), constants["MOST"], dtype=torch.int32, device=x.device)
        hidden = torch.empty(len(part), constants["MOST"], GROUP, dtype=torch.int32, device=x.device)
        top2_select_fwd_kernel[(len(part),)](
            keys, lanes, part, weight, bias, groups, hidden, packed[rows], num_features, d_in, num_groups,
            **constants, num_warps=num_warps,
        )  # fmt: skip
    return _unpacked(torch.sort(packed, dim=1, descending=True).values)


def is_possible(num_features: int, k: int) -> bool:
    """Whether every row keeps k entries, and one program can hold what it selects from."""
    constants, _ = selection_launch(num_features, k)
    held = max(2 * constants["BLOCK_GROUPS"], GROUP * constants["BLOCK_MOST"])
    return k <= triton.cdiv(num_features, GROUP) and held <= MAX_SELECTED_FROM


def selection_launch(num_features: int, k: int) -> tuple[dict[str, int], int]:
    """Constants and warps of `top2_select_fwd_kernel`."""
    most = (k + 1) // 2
    constants = {
        "K": k,
        "MOST": most,
        "BLOCK_MOST": int(triton.next_power_of_2(most)),
        "BLOCK_GROUPS": int(triton.next_power_of_2(triton.cdiv(num_features, GROUP))),
        "BLOCK_D": BLOCK_D,
    }
    held = max(2 * constants["BLOCK_GROUPS"], GROUP * constants["BLOCK_MOST"])
    # 8 warps for 8192 places would take 252 registers a thread.
    return constants, 4 if held <= 2048 else 8 if held <= 4096 else 16


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    """relu of the values [N, K], and the columns int64."""
    keys = (packed >> 32).to(torch.int32)
    bits = torch.where(keys < 0, keys ^ (2**31 - 1), keys)
    return bits.view(torch.float32).relu(), (2**31 - 1) - (packed & (2**32 - 1))
