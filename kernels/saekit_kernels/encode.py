"""Linear map and selection in one op: the k largest pre-activations of a token or of a batch, or all above a threshold.

All keep only the selected entries, so their backward costs O(N K D) and makes no [N, F] array.

Non-finite values: nothing is dropped silently. NaN ranks above every number (as in torch.topk) and is not below any
threshold, so a NaN or +inf pre-activation is selected, reaches the returned values and any loss made of them.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from saekit_kernels._batch import batch_topk
from saekit_kernels._candidates import topk as topk_of_candidates
from saekit_kernels._quantize import Kind
from saekit_kernels.backend import Backend, BackendError, load_primitives, resolve_backend
from saekit_kernels.primitives import Primitives, compute_dtype, without_autocast
from saekit_kernels.sparse_code import BatchTopKCode, ReverseIndex, ThresholdCode, TopKCode, reverse_index

if TYPE_CHECKING:

    class _Context(FunctionCtx):
        saved_tensors: tuple[Tensor, ...]
        needs_input_grad: tuple[bool, ...]
        primitives: Primitives
        reverse: ReverseIndex


_SelectPairs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_Select = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    candidates: Kind | None = None,
    backend: Backend = "auto",
) -> TopKCode:
    """relu of the k largest entries of z = x @ W_enc + b_enc of each token, exactly.

    Selection is by value, largest first, and by lowest index among equals. Selected entries that are not positive
    have value 0 and pass no gradient. Sums are accumulated in float32 (float64 for float64 operands), autocast or not;
    gradients come back in each operand's dtype, and W_enc's in the memory layout of a transposed [F, D] array.

    Args:
        x: [N, D] float; needs no gradient, or gets one.
        W_enc: [D, F]; fastest as the transposed view of contiguous [F, D] memory.
        b_enc: [F].
        k: 1 to F.
        candidates: "int8" or "fp8" (e4m3) scores all entries in that precision first, and only the best of them in full. The
            result is the same: it is proven per token from bounds on what 8 bits lose, and tokens without proof go the plain
            way. int8 has the tighter bound where no element of a row stands out. On a device the call waits for the number of
            those tokens. None, the default, scores everything in full; nothing else is measured to be faster yet.
        backend: see `resolve_backend`.

    Returns:
        values [N, k] and indices [N, k] int64; differentiable with respect to x, W_enc and b_enc.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, k is out of range, or `candidates` is unknown.
        BackendError: a forced backend cannot run, or the device has no products of 8-bit floats.

    Source: Gao et al. 2024, arXiv 2406.04093, section 2.3 (TopK activation).
    """
    check_operands("encode_topk", x, W_enc, b_enc)
    _check_k("encode_topk", k, W_enc)
    _check_candidates(candidates, x)
    primitives = load_primitives(resolve_backend(backend, x, W_enc, b_enc))

    def select(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if candidates is None:
            return primitives.topk(x, weight, bias, k)
        return topk_of_candidates(primitives, x, weight, bias, k, candidates)

    with without_autocast(x):
        values, indices = _EncodeTopK.apply(x, W_enc, b_enc, select, primitives)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return TopKCode(values, indices)


def encode_batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, backend: Backend = "auto") -> BatchTopKCode:
    """The N * k largest positive entries of z = x @ W_enc + b_enc over the whole batch, exactly, as CSR.

    A token has as many entries as its values are large. Selection is by value, largest first, and among equals by token and
    then by index, lowest first; where fewer than N * k are positive, those are all. The code is what a threshold gives, so
    gradients, dtypes and layouts are those of `encode_threshold`.

    Args:
        x: [N, D] float; needs no gradient, or gets one.
        W_enc: [D, F]; fastest as the transposed view of contiguous [F, D] memory.
        b_enc: [F].
        k: entries a token on average, 1 to F.
        backend: see `resolve_backend`. On a device the call waits for the number of entries.

    Returns:
        values [nnz] > 0 (or NaN), indices [nnz] int64 rising within a row, and offsets [N + 1] int64; values are
        differentiable with respect to x, W_enc and b_enc.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or k is out of range.
        BackendError: a forced backend cannot run.

    Source: Bussmann et al. 2024, arXiv 2412.06410, section 3 (BatchTopK).
    """
    check_operands("encode_batch_topk", x, W_enc, b_enc)
    _check_k("encode_batch_topk", k, W_enc)
    primitives = load_primitives(resolve_backend(backend, x, W_enc, b_enc))

    def select(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return batch_topk(primitives, x, weight, bias, k)

    with without_autocast(x):
        values, indices, offsets = _EncodeRows.apply(x, W_enc, b_enc, select, primitives)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return BatchTopKCode(values, indices, offsets)


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    bandwidth: float = 0.0,
    backend: Backend = "auto",
) -> ThresholdCode:
    """The entries of z = x @ W_enc + b_enc that are active or near their threshold, as CSR.

    The set is {z > threshold} and {|z - threshold| < bandwidth / 2} together, which is {z > threshold - bandwidth / 2}:
    all that a JumpReLU forward and its straight-through gradients read. The values are not gated, so that the caller
    can tell active from near ones; no gradient goes to `threshold` here.

    Args:
        x: [N, D] float.
        W_enc: [D, F]; fastest as the transposed view of contiguous [F, D] memory.
        b_enc: [F].
        threshold: [F].
        bandwidth: full width of the band around the threshold, in units of z; at least 0.
        backend: see `resolve_backend`.

    Returns:
        pre_acts [nnz], indices [nnz] int64 and offsets [N + 1] int64; pre_acts is differentiable with respect to x,
        W_enc and b_enc.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the bandwidth is negative or not finite.
        BackendError: a forced backend cannot run.

    Source: Rajamanoharan et al. 2024, arXiv 2407.14435, sections 3 and 4 (JumpReLU and its kernel estimates).
    """
    check_operands("encode_threshold", x, W_enc, b_enc)
    if threshold.shape != b_enc.shape or not threshold.is_floating_point() or threshold.device != x.device:
        found = f"{threshold.dtype} {list(threshold.shape)} on {threshold.device}"
        raise ValueError(
            f"encode_threshold: threshold is {found}, needs floating-point {list(b_enc.shape)} on {x.device}"
        )
    if not (math.isfinite(bandwidth) and bandwidth >= 0):
        raise ValueError(f"encode_threshold: bandwidth is {bandwidth}, needs a finite number, at least 0")
    primitives = load_primitives(resolve_backend(backend, x, W_enc, b_enc, threshold))
    bound = threshold.detach().to(compute_dtype(x, W_enc, b_enc, threshold)) - bandwidth / 2

    def select(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return primitives.threshold(x, weight, bias, bound)

    with without_autocast(x):
        pre_acts, indices, offsets = _EncodeRows.apply(x, W_enc, b_enc, select, primitives)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return ThresholdCode(pre_acts, indices, offsets)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "_Context", x: Tensor, W_enc: Tensor, b_enc: Tensor, select: "_SelectPairs", primitives: Primitives
    ) -> tuple[Tensor, Tensor]:
        values, indices = select(x, W_enc.T, b_enc)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_enc, values)
        ctx.primitives = primitives
        ctx.reverse = reverse_index(indices, W_enc.shape[1], is_unique=True)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: "_Context", *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_values = grads[0]
        if grad_values is None:
            return None, None, None, None, None
        x, W_enc, b_enc, values = ctx.saved_tensors
        # <= rather than not >: a NaN value passes its gradient on, as relu's own backward does.
        grad_z = grad_values.masked_fill(values <= 0, 0.0)
        return *_linear_gradients(ctx, grad_z, x, W_enc, b_enc), None, None


class _EncodeRows(torch.autograd.Function):
    """Rows of varying length: whatever `select` takes of the entries of z, as CSR and not gated."""

    @staticmethod
    def forward(
        ctx: "_Context", x: Tensor, W_enc: Tensor, b_enc: Tensor, select: "_Select", primitives: Primitives
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre_acts, indices, offsets = select(x, W_enc.T, b_enc)
        ctx.mark_non_differentiable(indices, offsets)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, b_enc)
        ctx.primitives = primitives
        ctx.reverse = reverse_index(indices, W_enc.shape[1], offsets=offsets, is_unique=True)
        return pre_acts, indices, offsets

    @staticmethod
    @once_differentiable
    def backward(ctx: "_Context", *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_pre_acts = grads[0]
        if grad_pre_acts is None:
            return None, None, None, None, None
        x, W_enc, b_enc = ctx.saved_tensors
        return *_linear_gradients(ctx, grad_pre_acts, x, W_enc, b_enc), None, None


def _linear_gradients(
    ctx: "_Context", grad_z: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [N, D], W_enc [D, F] and b_enc [F] from those of the stored entries of z."""
    if not ctx.reverse.is_current:
        raise RuntimeError("encode: its indices were changed in place, needs them as they were for the backward")
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    primitives, reverse = ctx.primitives, ctx.reverse
    with without_autocast(x):
        grad_x = primitives.gather_sum(grad_z, reverse.entries, W_enc.T, dtype=x.dtype) if needs_x else None
        # [F, D] sums handed back as a view: the layout of the parameter, and no transposed copy.
        grad_weight = primitives.scatter_sum(grad_z, reverse, x, dtype=W_enc.dtype).T if needs_weight else None
        grad_bias = primitives.feature_sum(grad_z, reverse, dtype=b_enc.dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias


def _check_candidates(candidates: Kind | None, x: Tensor) -> None:
    if candidates is not None and candidates not in get_args(Kind):
        raise ValueError(f"encode_topk: candidates is {candidates!r}, needs None or one of {', '.join(get_args(Kind))}")
    if candidates == "fp8" and x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 9):
        found = torch.cuda.get_device_name(x.device)
        raise BackendError(f"encode_topk: candidates is 'fp8' on {found}, needs sm_89 or later; take 'int8'")


def _check_k(where: str, k: int, W_enc: Tensor) -> None:
    if not 1 <= k <= W_enc.shape[1]:
        raise ValueError(f"{where}: k is {k}, needs 1 to d_sae = {W_enc.shape[1]}")


def check_operands(where: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, *, may_be_empty: bool = False) -> None:
    """Refuses operands of a linear map that do not fit together."""
    if x.ndim != 2 or W_enc.ndim != 2 or b_enc.ndim != 1:
        shapes = f"x {list(x.shape)}, W_enc {list(W_enc.shape)}, b_enc {list(b_enc.shape)}"
        raise ValueError(f"{where}: {shapes}, needs x [N, D], W_enc [D, F], b_enc [F]")
    if x.shape[1] != W_enc.shape[0] or W_enc.shape[1] != b_enc.shape[0] or (0 in W_enc.shape and not may_be_empty):
        shapes = f"x {list(x.shape)}, W_enc {list(W_enc.shape)}, b_enc {list(b_enc.shape)}"
        raise ValueError(
            f"{where}: {shapes}, needs x [N, D], W_enc [D, F], b_enc [F] with equal D and F, none of them 0"
        )
    if not all(tensor.is_floating_point() for tensor in (x, W_enc, b_enc)):
        raise ValueError(f"{where}: dtypes {x.dtype}, {W_enc.dtype}, {b_enc.dtype}, needs floating point")
    if len({x.device, W_enc.device, b_enc.device}) > 1:
        raise ValueError(f"{where}: operands on {x.device}, {W_enc.device}, {b_enc.device}, needs one device")
