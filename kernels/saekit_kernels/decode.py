"""Sparse decode: x_hat from the entries of a code, and its gradients from those entries alone."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from saekit_kernels.backend import Backend, load_primitives, resolve_backend
from saekit_kernels.primitives import Primitives, compute_dtype, without_autocast
from saekit_kernels.sparse_code import ReverseIndex, reverse_index

if TYPE_CHECKING:

    class _Context(FunctionCtx):
        saved_tensors: tuple[Tensor, ...]
        needs_input_grad: tuple[bool, ...]
        primitives: Primitives
        reverse: ReverseIndex
        bias_dtype: torch.dtype


def decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x_hat[n] = sum over the entries of row n of values * W_dec[indices], plus b_dec.

    An index may stand more than once in a row; its values add up (unused places hold value 0 and any valid index).
    When `indices` is the very tensor that an encoder returned, both backwards share one reverse index.

    Args:
        values: [N, K], or [nnz] with `offsets`.
        indices: of the same shape, int64 or int32, in [0, F). Checked on the CPU; on CUDA an index out of range is
            undefined, as a check would have to wait for the device.
        W_dec: [F, D].
        b_dec: [D], or None for none.
        offsets: [N + 1] int64 of a CSR code: row n owns the entries offsets[n] to offsets[n + 1].
        backend: see `resolve_backend`.

    Returns:
        x_hat [N, D], float32 (float64 if an operand is); differentiable with respect to values, W_dec and b_dec,
        gradients in each operand's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or (CPU) an index or offset is out of range.
        BackendError: a forced backend cannot run.
    """
    _check_code(values, indices, offsets, W_dec.shape[0])
    _check_weights(values, W_dec, b_dec)
    operands = [values, W_dec] if b_dec is None else [values, W_dec, b_dec]
    primitives = load_primitives(resolve_backend(backend, *operands))
    with without_autocast(values):
        x_hat: Tensor = _Decode.apply(values, indices, W_dec, b_dec, offsets, primitives)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return x_hat


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "_Context",
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        offsets: Tensor | None,
        primitives: Primitives,
    ) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.primitives = primitives
        ctx.reverse = reverse_index(indices, W_dec.shape[0], offsets=offsets)
        ctx.bias_dtype = W_dec.dtype if b_dec is None else b_dec.dtype
        dtype = compute_dtype(values, W_dec, b_dec)
        return primitives.gather_sum(values, ctx.reverse.entries, W_dec, bias=b_dec, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: "_Context", *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.reverse.is_current:
            raise RuntimeError("decode: its indices were changed in place, needs them as they were for the backward")
        values, W_dec = ctx.saved_tensors
        needs_values, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        primitives, reverse = ctx.primitives, ctx.reverse
        grad_values, grad_weight = None, None
        with without_autocast(grad):
            if needs_values:
                dots = primitives.gather_dot(grad, reverse.entries, W_dec, dtype=values.dtype)
                grad_values = dots.view(values.shape)
            if needs_weight:
                grad_weight = primitives.scatter_sum(values, reverse, grad, dtype=W_dec.dtype)
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return grad_values, None, grad_weight, grad_bias, None, None


def _check_code(values: Tensor, indices: Tensor, offsets: Tensor | None, num_features: int) -> None:
    num_dims = 2 if offsets is None else 1
    if values.shape != indices.shape or values.ndim != num_dims:
        layout = "[N, K]" if offsets is None else "[nnz] (CSR)"
        raise ValueError(f"decode: values {list(values.shape)}, indices {list(indices.shape)}, needs both {layout}")
    if indices.dtype not in (torch.int64, torch.int32) or not values.is_floating_point():
        raise ValueError(
            f"decode: values {values.dtype}, indices {indices.dtype}, needs floating point and int64 or int32"
        )
    if indices.device != values.device:
        raise ValueError(f"decode: values on {values.device}, indices on {indices.device}, needs one device")
    if offsets is not None:
        _check_offsets(offsets, indices)
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= num_features:
            raise ValueError(f"decode: indices from {low} to {high}, needs 0 to {num_features - 1} (rows of W_dec)")


def _check_offsets(offsets: Tensor, indices: Tensor) -> None:
    if offsets.ndim != 1 or offsets.numel() < 1 or offsets.dtype != torch.int64 or offsets.device != indices.device:
        found = f"{offsets.dtype} {list(offsets.shape)} on {offsets.device}"
        raise ValueError(f"decode: offsets {found}, needs int64 [N + 1] on {indices.device}")
    if offsets.device.type == "cpu":
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != indices.numel() or bool((offsets.diff() < 0).any()):
            raise ValueError(f"decode: offsets from {first} to {last}, needs rising ones from 0 to {indices.numel()}")


def _check_weights(values: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> None:
    if W_dec.ndim != 2 or not W_dec.is_floating_point() or W_dec.device != values.device:
        found = f"{W_dec.dtype} {list(W_dec.shape)} on {W_dec.device}"
        raise ValueError(f"decode: W_dec is {found}, needs floating-point [F, D] on {values.device}")
    if b_dec is None:
        return
    if b_dec.shape != W_dec.shape[1:] or not b_dec.is_floating_point() or b_dec.device != values.device:
        found = f"{b_dec.dtype} {list(b_dec.shape)} on {b_dec.device}"
        raise ValueError(f"decode: b_dec is {found}, needs floating-point [{W_dec.shape[1]}] on {values.device}")
