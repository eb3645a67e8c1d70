"""The CPU path: torch operators only, float32 accumulation (float64 for float64 operands).

Figures in comments: AMD EPYC with AVX-512, one thread, torch 2.13, N = 2048, D = 576, F = 4608, K = 32.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor

from saekit_kernels import _dense, _memory
from saekit_kernels._cpu_optim import adam, gradient_square
from saekit_kernels._quantize import Kind, Quantized, feature_bias, quantize, token_margin
from saekit_kernels.primitives import compute_dtype
from saekit_kernels.sparse_code import Entries, ReverseIndex

__all__ = [
    "adam",
    "candidates",
    "feature_sum",
    "gather_dot",
    "gather_sum",
    "gradient_square",
    "scatter_sum",
    "threshold",
    "topk",
]

# Under about 1024 rows the matrix product packs the weight too often; over it nothing is won.
_CHUNK_ROWS = 1024
_CHUNK_BYTES = 1 << 28
_MIN_CHUNK_ROWS = 128


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Primitives.topk`. Pre-activations exist for one chunk of rows at a time."""
    x, weight, bias = _same_dtype(x, weight, bias)
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    for start, z in product_chunks(x, weight):
        # Not addmm: adding the bias in place is 2 ms, addmm is 14 ms slower than mm.
        z += bias
        rows = slice(start, start + len(z))
        values[rows], indices[rows] = _exact_topk(z, k)
    return values.relu_(), indices


def threshold(x: Tensor, weight: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Primitives.threshold`. Pre-activations exist for one chunk of rows at a time."""
    x, weight, bias = _same_dtype(x, weight, bias)
    bound = bound.to(x.dtype)
    num_features = len(weight)
    pre_acts, indices = [x.new_empty(0)], [torch.empty(0, dtype=torch.int64)]
    counts = torch.zeros(len(x) + 1, dtype=torch.int64)
    for start, z in product_chunks(x, weight):
        z += bias
        places = _places_not_below(z, bound)
        pre_acts.append(z.view(-1).index_select(0, places))
        indices.append(places % num_features)
        edges = torch.arange(1, len(z) + 1) * num_features
        ends = torch.searchsorted(places, edges)
        counts[start + 1 : start + 1 + len(z)] = ends + counts[start]
    return torch.cat(pre_acts), torch.cat(indices), counts


def candidates(x: Tensor, weight: Tensor, bias: Tensor, count: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """See `Primitives.candidates`. Bounds exist for one chunk of rows at a time."""
    return candidates_by(_largest_columns, x, weight, bias, count, kind)


def candidates_by(
    largest_columns: Callable[[Tensor, int], Tensor], x: Tensor, weight: Tensor, bias: Tensor, count: int, kind: Kind
) -> tuple[Tensor, Tensor]:
    """`candidates` with a function that finds the columns of the `count` largest of each row, in any order."""
    x, weight, bias = _same_dtype(x, weight, bias)
    tokens, features = quantize(x, kind), quantize(weight, kind)
    raised = feature_bias(bias, features)
    columns = torch.empty(len(x), count, dtype=torch.int64)
    bound = x.new_empty(len(x))
    for start, upper in _upper_bounds(tokens, features, kind, x.dtype):
        upper += raised
        rows = slice(start, start + len(upper))
        columns[rows] = largest_columns(upper, count).sort(dim=1).values
        bound[rows] = upper.gather(1, columns[rows]).amin(1)
    return columns, bound.masked_fill_(tokens.is_left_out, torch.inf)


def gather_sum(
    values: Tensor, entries: Entries, weight: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """See `Primitives.gather_sum`."""
    values, weight = _same_dtype(values, weight)
    values = values.view(-1)
    if _dense.is_dense(entries, len(weight)):
        out = _dense.gather_sum(values, entries, weight)
    else:
        out = _bag_sums(values, entries.indices, entries.row_offsets, weight)
    if bias is not None:
        out += bias
    return out.to(dtype)


def gather_dot(rows: Tensor, entries: Entries, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.gather_dot`."""
    rows, weight = _same_dtype(rows, weight)
    if _dense.is_dense(entries, len(weight)):
        return _dense.gather_dot(rows, entries, weight).to(dtype)
    # The operator behind the gradient of embedding_bag's weights: 6 ms, gather + bmm 140 ms.
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, weight, entries.indices, entries.row_offsets, entries.rows(), 0
    )
    return dots.to(dtype)


def scatter_sum(values: Tensor, reverse: ReverseIndex, rows: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.scatter_sum`."""
    values, rows = _same_dtype(values, rows)
    values = values.view(-1)
    if _dense.is_dense(reverse.entries, reverse.num_features):
        return _dense.scatter_sum(values, reverse.entries, reverse.num_features, rows).to(dtype)
    # A bag per feature over its tokens: 3 ms; index_add_ of the K contributions of every token: over 100 ms.
    return _bag_sums(values[reverse.order], reverse.rows, reverse.offsets, rows).to(dtype)


def feature_sum(values: Tensor, reverse: ReverseIndex, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.feature_sum`."""
    sums = values.new_zeros(reverse.num_features, dtype=compute_dtype(values))
    return sums.index_add_(0, reverse.entries.indices, values.reshape(-1).to(sums.dtype)).to(dtype)


def _bag_sums(values: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """out[b] = sum of values * table[indices] over the entries offsets[b] to offsets[b + 1]."""
    return functional.embedding_bag(
        indices, table, offsets=offsets, per_sample_weights=values, mode="sum", include_last_offset=True
    )


def _same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = compute_dtype(*tensors)
    return tuple(tensor.to(dtype).contiguous() for tensor in tensors)


def product_chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, x @ weight.T of its chunk [<= chunk rows, F]); the buffer is reused: use it before asking for the next."""
    num_features = len(weight)
    fitting = _CHUNK_BYTES // (num_features * x.element_size())
    num_rows = min(len(x), max(_MIN_CHUNK_ROWS, min(_CHUNK_ROWS, fitting)))
    buffer = _memory.empty(num_rows, num_features, dtype=x.dtype)
    for start in range(0, len(x), max(num_rows, 1)):
        part = x[start : start + num_rows]
        z = buffer[: len(part)]
        torch.mm(part, weight.T, out=z)
        yield start, z


def _upper_bounds(
    tokens: Quantized, features: Quantized, kind: Kind, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Upper bounds [<= chunk rows, F] of x @ weight.T, as `product_chunks` gives products."""
    size = torch.stack([tokens.norm + tokens.rest, token_margin(tokens, kind)], dim=1)
    of_feature = torch.stack([features.rest, features.norm], dim=1)
    if kind == "int8" and torch.cpu._is_vnni_supported():
        for start, upper in product_chunks(size, of_feature):
            rows = slice(start, start + len(upper))
            products = torch._int_mm(tokens.codes[rows], features.codes.T).to(dtype)
            yield start, upper.add_(products.mul_(tokens.scale[rows, None]).mul_(features.scale))
        return
    # Without instructions for 8-bit products torch takes 26 times as long for them as for float32 (AMD EPYC, AVX2). So the
    # codes are widened, and the two products of norms come as two more columns.
    widened = [part.codes.to(dtype) * part.scale[:, None] for part in (tokens, features)]
    yield from product_chunks(torch.cat([widened[0], size], dim=1), torch.cat([widened[1], of_feature], dim=1))


def _exact_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z [B, F] in the order of `Primitives.topk`."""
    # One more than k, so that a tie between a selected and a rejected value shows as two equal neighbours.
    num_candidates = min(k + 1, z.shape[1])
    columns = _largest_columns(z, num_candidates)
    values, order = torch.sort(z.gather(1, columns), dim=1, descending=True)
    columns = columns.gather(1, order)
    has_tie = (values[:, 1:] < values[:, :-1]).all(1).logical_not_()
    if has_tie.any():
        rows = has_tie.nonzero().view(-1)
        tied, order = torch.sort(z[rows], dim=1, descending=True, stable=True)
        values[rows], columns[rows] = tied[:, :num_candidates], order[:, :num_candidates]
    return values[:, :k], columns[:, :k]


def _largest_columns(z: Tensor, k: int) -> Tensor:
    """Columns [B, k] of the k largest of each row, in any order; which of two equal values is taken is open.

    The k largest lie in the k groups with the largest maxima, so a tournament over groups (of columns that lie apart,
    for a reduction along contiguous memory) leaves few candidates: 18 ms where torch.topk takes 29.
    """
    num_columns = z.shape[1]
    if num_columns < 16 * k:
        return torch.topk(z, k, dim=1, sorted=False).indices
    group_size = 8 if num_columns >= 256 * k else 4
    num_groups = num_columns // group_size
    grouped = z[:, : num_groups * group_size].view(len(z), group_size, num_groups)
    groups = _largest_columns(grouped.amax(1), k)
    members = torch.arange(0, num_groups * group_size, num_groups).view(1, group_size, 1)
    candidates = (groups.unsqueeze(1) + members).flatten(1)
    if rest := num_columns % group_size:
        leftover = torch.arange(num_columns - rest, num_columns).expand(len(z), rest)
        candidates = torch.cat([candidates, leftover], dim=1)
    chosen = torch.topk(z.gather(1, candidates), k, dim=1, sorted=False).indices
    return candidates.gather(1, chosen)


def _places_not_below(z: Tensor, bound: Tensor) -> Tensor:
    """Flat places [nnz], rising, of the entries of z [B, F] that are not <= bound [F] (so NaN is among them)."""
    # Looked for eight flags at a time: 1.2 ms where nonzero on the flags takes 5.4 (1024 rows, 16 of 4608 kept).
    flags = torch.zeros(-(-z.numel() // 8) * 8, dtype=torch.bool)
    is_kept = flags[: z.numel()]
    torch.le(z, bound, out=is_kept.view(z.shape)).logical_not_()
    words = flags.view(torch.int64).nonzero().view(-1)
    if words.numel() > flags.numel() // 64:
        return is_kept.nonzero().view(-1)
    within = flags.view(-1, 8)[words].view(-1).nonzero().view(-1)
    return words[within >> 3] * 8 + (within & 7)
