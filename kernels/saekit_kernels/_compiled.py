"""The compiled CPU path: C++ for float32, torch operators for every other dtype and for codes that are not sparse.

Figures in comments: AMD EPYC (Zen 3, AVX2), one thread, torch 2.13, N = 2048, D = 576, F = 4608, K = 32.
"""

import torch
from torch import Tensor

from saekit_kernels import _build, _cpu, _cpu_optim, _dense, _memory
from saekit_kernels._quantize import Kind
from saekit_kernels.primitives import AdamStep
from saekit_kernels.sparse_code import Entries, ReverseIndex


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Primitives.topk`. Pre-activations exist for one chunk of rows at a time."""
    if not _is_float32(x, weight, bias):
        return _cpu.topk(x, weight, bias, k)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64)
    for start, z in _cpu.product_chunks(x, weight):
        rows = slice(start, start + len(z))
        _run("topk", z, bias, values[rows], indices[rows], *z.shape, k)
    return values, indices


def threshold(x: Tensor, weight: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Primitives.threshold`. Pre-activations exist for one chunk of rows at a time."""
    if not _is_float32(x, weight, bias, bound):
        return _cpu.threshold(x, weight, bias, bound)
    x, weight, bias, bound = x.contiguous(), weight.contiguous(), bias.contiguous(), bound.contiguous()
    num_words = -(-len(weight) // 64)
    pre_acts, indices = [x.new_empty(0)], [torch.empty(0, dtype=torch.int64)]
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64)
    for start, z in _cpu.product_chunks(x, weight):
        bits = torch.empty(len(z), num_words, dtype=torch.int64)
        ends = offsets[start + 1 : start + 1 + len(z)]
        _run("mark_above", z, bias, bound, bits, ends, *z.shape, num_words)
        starts = ends.cumsum(0).sub_(ends)
        num_entries = int(ends.sum())
        ends.cumsum_(0).add_(offsets[start])
        pre_acts.append(x.new_empty(num_entries))
        indices.append(torch.empty(num_entries, dtype=torch.int64))
        _run("take_marked", z, bias, bits, starts, pre_acts[-1], indices[-1], *z.shape, num_words)
    return torch.cat(pre_acts), torch.cat(indices), offsets


def candidates(x: Tensor, weight: Tensor, bias: Tensor, count: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """See `Primitives.candidates`. Bounds exist for one chunk of rows at a time."""
    if not _is_float32(x, weight, bias):
        return _cpu.candidates(x, weight, bias, count, kind)
    return _cpu.candidates_by(_largest_columns, x, weight, bias, count, kind)


def gather_sum(
    values: Tensor, entries: Entries, weight: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """See `Primitives.gather_sum`."""
    operands = (values, weight) if bias is None else (values, weight, bias)
    if not _is_float32(*operands) or _dense.is_dense(entries, len(weight)):
        return _cpu.gather_sum(values, entries, weight, bias=bias, dtype=dtype)
    values, weight = values.contiguous(), weight.contiguous()
    out = _memory.empty(entries.num_rows, weight.shape[1], dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    _run("bag_sums", values, None, _places(entries), entries.row_offsets, weight, bias, out, *out.shape)
    return out.to(dtype)


def gather_dot(rows: Tensor, entries: Entries, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.gather_dot`."""
    if not _is_float32(rows, weight) or _dense.is_dense(entries, len(weight)):
        return _cpu.gather_dot(rows, entries, weight, dtype=dtype)
    rows, weight = rows.contiguous(), weight.contiguous()
    out = rows.new_empty(entries.indices.numel())
    _run("bag_dots", rows, _places(entries), entries.row_offsets, weight, out, *rows.shape)
    return out.to(dtype)


def scatter_sum(values: Tensor, reverse: ReverseIndex, rows: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.scatter_sum`."""
    if not _is_float32(values, rows) or _dense.is_dense(reverse.entries, reverse.num_features):
        return _cpu.scatter_sum(values, reverse, rows, dtype=dtype)
    values, rows = values.contiguous(), rows.contiguous()
    out = _memory.empty(reverse.num_features, rows.shape[1], dtype=torch.float32)
    _run("bag_sums", values, reverse.order, reverse.rows, reverse.offsets, rows, None, out, *out.shape)
    return out.to(dtype)


def feature_sum(values: Tensor, reverse: ReverseIndex, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.feature_sum`."""
    # The dense sums need no order of the entries by feature: sorting them for this alone takes ten times as long as adding.
    if not _is_float32(values) or _dense.is_dense(reverse.entries, reverse.num_features):
        return _cpu.feature_sum(values, reverse, dtype=dtype)
    out = values.new_empty(reverse.num_features)
    _run("value_sums", values.contiguous(), reverse.order, reverse.offsets, out, len(out))
    return out.to(dtype)


def adam(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    step: AdamStep,
    *,
    scale: Tensor | float,
    shadow: Tensor | None,
) -> None:
    """See `Primitives.adam`."""
    if not _is_float32(weight, grad, *moments):
        _cpu_optim.adam(weight, grad, moments, step, scale=scale, shadow=shadow)
        return
    in_pass = shadow if shadow is not None and shadow.dtype == torch.bfloat16 else None
    corrected = float(step.step_size), step.beta1, step.beta2, step.eps, float(step.root_correction)
    row = _row_length(weight, is_unit_norm=step.is_unit_norm)
    _run(
        "adam",
        weight,
        grad.contiguous(),
        *moments,
        in_pass,
        weight.numel(),
        row,
        float(scale),
        *corrected,
        int(step.is_unit_norm),
    )
    if shadow is not None and in_pass is None:
        shadow.copy_(weight)


def gradient_square(grad: Tensor, weight: Tensor | None) -> Tensor:
    """See `Primitives.gradient_square`."""
    if not _is_float32(grad) or (weight is not None and not _is_float32(weight)):
        return _cpu_optim.gradient_square(grad, weight)
    row = _row_length(grad, is_unit_norm=weight is not None)
    squares = torch.empty(-(-grad.numel() // row), dtype=torch.float64)
    rows = None if weight is None else weight.contiguous()
    _run("gradient_square", rows, grad.contiguous(), squares, grad.numel(), row)
    return squares.sum()


def _largest_columns(z: Tensor, count: int) -> Tensor:
    """Columns [B, count] of the largest of each row."""
    columns = torch.empty(len(z), count, dtype=torch.int64)
    _run("topk", z, z.new_zeros(z.shape[1]), z.new_empty(len(z), count), columns, *z.shape, count)
    return columns


def _row_length(tensor: Tensor, *, is_unit_norm: bool) -> int:
    """Elements that are handled at once: a row where rows matter, else as many as a thread does in a turn."""
    return max(1, tensor.shape[1]) if is_unit_norm else 4096


def _is_float32(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def _places(entries: Entries) -> Tensor:
    return entries.indices.to(torch.int64).contiguous()


def _run(name: str, *arguments: Tensor | float | None) -> None:
    """Calls saekit_<name> with the tensors' memory, the numbers and the number of threads."""
    function = getattr(_build.library(), f"saekit_{name}")
    # ctypes lets other Python threads run meanwhile; the caller's variables keep the memory alive.
    function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())
