"""Exact top-k by way of a cheap score: candidates by 8-bit products, scored again in full, and proven to be complete.

A backend finds for each token the entries with the largest upper bounds, and the largest bound outside them. Where the k-th
largest exact score among the candidates exceeds that, nothing outside can be among the k largest. Tokens for which it does not
(ties, outliers, numbers that are not finite, too few candidates) go the plain way, so the result is exact for every input.
"""

import torch
from torch import Tensor

from saekit_kernels._quantize import Kind
from saekit_kernels.primitives import Primitives, compute_dtype
from saekit_kernels.sparse_code import Entries

# Candidates for each entry that is wanted. With int8 and d_in 576, Gaussian tokens need about 3; heavy tails need more.
CANDIDATES_PER_ENTRY = 8


def topk(primitives: Primitives, x: Tensor, weight: Tensor, bias: Tensor, k: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """What `Primitives.topk` returns, by way of candidates. Waits for the device once, for the number of unproven tokens."""
    if CANDIDATES_PER_ENTRY * k >= len(weight):
        return primitives.topk(x, weight, bias, k)
    values, indices, is_proven = proven_topk(primitives, x, weight, bias, k, kind)
    rows = is_proven.logical_not().nonzero().view(-1)
    if len(rows):
        values[rows], indices[rows] = primitives.topk(x[rows], weight, bias, k)
    return values, indices


def proven_topk(
    primitives: Primitives, x: Tensor, weight: Tensor, bias: Tensor, k: int, kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices [N, k] of the best candidates, and whether they are the best of all entries [N] bool."""
    columns, bound = primitives.candidates(x, weight, bias, CANDIDATES_PER_ENTRY * k, kind)
    dtype = compute_dtype(x, weight, bias)
    entries = Entries(indices=columns.view(-1), num_rows=len(x), width=columns.shape[1])
    z = primitives.gather_dot(x, entries, weight, dtype=dtype).view(columns.shape) + bias.to(dtype)[columns]
    # Candidates stand in rising columns, and a stable sort keeps that order among equals.
    ordered, order = torch.sort(z, dim=1, descending=True, stable=True)
    # Strictly above: an equal value outside may have the lower index. False for NaN.
    is_proven = ordered[:, k - 1] > bound
    return ordered[:, :k].relu(), columns.gather(1, order[:, :k]), is_proven
