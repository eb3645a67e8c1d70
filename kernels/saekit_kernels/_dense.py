"""Sums for codes that are not sparse: dense products over blocks of rows.

A JumpReLU may begin with a tenth or a half of its features active, and AuxK takes half as many dead features a token as there
are dimensions; a gather then costs more than the matrix product it replaces. Only a block of rows of the code is dense at a time,
so no [N, F] array is made here either.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saekit_kernels.sparse_code import Entries

# Where the sums of one backward cost the same both ways (AMD EPYC, one thread, N = 2048, D = 576, F = 4608): at a density
# of 0.1 the sparse ones take half the time, at 0.2 a quarter more, at 0.4 two and a half times as much.
MIN_DENSITY = 0.15
BLOCK_ROWS = 256


def is_dense(entries: Entries, num_features: int, *, min_density: float | None = None) -> bool:
    """Whether the dense sums are the faster ones."""
    limit = MIN_DENSITY if min_density is None else min_density
    return entries.num_rows > 0 and entries.indices.numel() > limit * entries.num_rows * num_features


def gather_sum(values: Tensor, entries: Entries, weight: Tensor) -> Tensor:
    """out[n] = sum of values * weight[index] over the row's entries: [N, D]."""
    out = weight.new_empty(entries.num_rows, weight.shape[1])
    for rows, part, places in _blocks(entries, len(weight)):
        torch.mm(_dense(values[part], places, rows, len(weight), entries), weight, out=out[rows])
    return out


def gather_dot(rows: Tensor, entries: Entries, weight: Tensor) -> Tensor:
    """out[e] = <rows[row(e)], weight[index(e)]>: [nnz]."""
    out = rows.new_empty(entries.indices.numel())
    for block, part, places in _blocks(entries, len(weight)):
        torch.index_select((rows[block] @ weight.T).view(-1), 0, places, out=out[part])
    return out


def scatter_sum(values: Tensor, entries: Entries, num_features: int, rows: Tensor) -> Tensor:
    """out[f] = sum over the entries of feature f of values * rows: [F, D]."""
    out = rows.new_zeros(num_features, rows.shape[1])
    for block, part, places in _blocks(entries, num_features):
        out.addmm_(_dense(values[part], places, block, num_features, entries).T, rows[block])
    return out


def _blocks(entries: Entries, num_features: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, entries, and the entries' flat places in the dense block [rows, F]."""
    device = entries.indices.device
    for start in range(0, entries.num_rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, entries.num_rows)
        first_places = torch.arange(0, (stop - start) * num_features, num_features, device=device)
        if entries.width is not None:
            part = slice(start * entries.width, stop * entries.width)
            places = first_places.repeat_interleave(entries.width)
        else:
            edges = entries.row_offsets
            part = slice(int(edges[start]), int(edges[stop]))
            counts = edges[start : stop + 1].diff()
            places = first_places.repeat_interleave(counts, output_size=part.stop - part.start)
        yield slice(start, stop), part, places.add_(entries.indices[part])


def _dense(values: Tensor, places: Tensor, rows: slice, num_features: int, entries: Entries) -> Tensor:
    """[rows, F]; values of the same place add up."""
    out = values.new_zeros((rows.stop - rows.start) * num_features)
    # Where no place repeats nothing has to be added, which a GPU would do in any order.
    out = out.scatter_(0, places, values) if entries.is_unique else out.index_add_(0, places, values)
    return out.view(-1, num_features)
