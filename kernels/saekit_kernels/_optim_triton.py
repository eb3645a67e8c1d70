# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# Reason: bodies of @triton.jit functions are device code; their parameters are pointers and integers without a Python type.
"""The optimizer pass in Triton: one program a row, which is read, moved, normalised and written once.

Where rows have no unit norm their borders do not matter, and the array is cut into pieces of one length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels import reference
from saekit_kernels.primitives import AdamStep

# Elements of a program: a row of 16,384 spills.
MAX_ROW = 8192
# Elements of a program where rows do not matter.
PIECE = 1024


@triton.jit
def _rest(gradient, weight):
    """The gradient less its part along the weight, whose norm is 1."""
    return gradient - tl.sum(gradient * weight, 0) * weight


@triton.jit
def adam_kernel(
    weight_ptr, grad_ptr, mean_ptr, square_ptr, shadow_ptr, scale_ptr, size, length,
    step_size, beta1, beta2, eps, root_correction,
    IS_UNIT_NORM: tl.constexpr, HAS_SHADOW: tl.constexpr, ARE_POINTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adam on one row of `length` elements; the last may be shorter. ARE_POINTERS: of step_size and root_correction."""
    if ARE_POINTERS:
        step_size = tl.load(step_size)
        root_correction = tl.load(root_correction)
    columns = tl.arange(0, BLOCK)
    places = tl.program_id(0).to(tl.int64) * length + columns
    is_inside = (columns < length) & (places < size)
    w = tl.load(weight_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    square = tl.load(square_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    if IS_UNIT_NORM:
        g = _rest(g, w)
    g *= tl.load(scale_ptr)
    mean += (1.0 - beta1) * (g - mean)
    square = beta2 * square + (1.0 - beta2) * g * g
    w -= step_size * mean / (tl.sqrt(square) / root_correction + eps)
    if IS_UNIT_NORM:
        # The smallest normal number, as in the reference: a row of zeros stays one.
        w /= tl.maximum(tl.sqrt(tl.sum(tl.where(is_inside, w * w, 0.0), 0)), 1.1754944e-38)
    tl.store(weight_ptr + places, w.to(weight_ptr.dtype.element_ty), mask=is_inside)
    tl.store(mean_ptr + places, mean.to(mean_ptr.dtype.element_ty), mask=is_inside)
    tl.store(square_ptr + places, square.to(square_ptr.dtype.element_ty), mask=is_inside)
    if HAS_SHADOW:
        tl.store(shadow_ptr + places, w.to(shadow_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def gradient_square_kernel(
    weight_ptr, grad_ptr, out_ptr, size, length, IS_UNIT_NORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of squares of one row of the gradient, less its part along the row of the weight."""
    columns = tl.arange(0, BLOCK)
    places = tl.program_id(0).to(tl.int64) * length + columns
    is_inside = (columns < length) & (places < size)
    g = tl.load(grad_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    if IS_UNIT_NORM:
        g = _rest(g, tl.load(weight_ptr + places, mask=is_inside, other=0.0).to(tl.float32))
    tl.store(out_ptr + tl.program_id(0), tl.sum(g * g, 0))


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
    length = row_length(weight, is_unit_norm=step.is_unit_norm)
    if length > MAX_ROW:
        reference.adam(weight, grad, moments, step, scale=scale, shadow=shadow)
        return
    factor = _on_device(scale, weight)
    step_size, root_correction = step.step_size, step.root_correction
    are_pointers = isinstance(step_size, Tensor) or isinstance(root_correction, Tensor)
    if are_pointers:
        step_size, root_correction = _on_device(step_size, weight), _on_device(root_correction, weight)
    numbers = (step_size, step.beta1, step.beta2, step.eps, root_correction)
    block, num_warps = launch(length)
    if weight.numel():
        adam_kernel[(triton.cdiv(weight.numel(), length),)](
            weight, grad.contiguous(), *moments, weight if shadow is None else shadow, factor, weight.numel(), length,
            *numbers, IS_UNIT_NORM=step.is_unit_norm, HAS_SHADOW=shadow is not None, ARE_POINTERS=are_pointers,
            BLOCK=block, num_warps=num_warps,
        )  # fmt: skip


def gradient_square(grad: Tensor, weight: Tensor | None) -> Tensor:
    """See `Primitives.gradient_square`."""
    length = row_length(grad, is_unit_norm=weight is not None)
    if length > MAX_ROW or not grad.numel():
        return reference.gradient_square(grad, weight)
    grad = grad.contiguous()
    squares = torch.empty(triton.cdiv(grad.numel(), length), dtype=torch.float32, device=grad.device)
    block, num_warps = launch(length)
    gradient_square_kernel[(len(squares),)](
        grad if weight is None else weight.contiguous(), grad, squares, grad.numel(), length,
        IS_UNIT_NORM=weight is not None, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return squares.sum(dtype=torch.float64)


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar beside `like`, float32; nothing is waited for where it was computed there."""
    if isinstance(value, Tensor):
        return value.to(like.device, torch.float32)
    # A fill, not a copy from the host, which would be one more wait.
    return torch.full((), value, dtype=torch.float32, device=like.device)


def row_length(tensor: Tensor, *, is_unit_norm: bool) -> int:
    """Elements of a program: a row, or a piece of any array."""
    return max(1, tensor.shape[1]) if is_unit_norm else PIECE


def launch(length: int) -> tuple[int, int]:
    """Block and warps for rows of a length: 16 elements of four arrays a thread, or fewer."""
    block = max(16, int(triton.next_power_of_2(length)))
    return block, min(32, max(4, block // 512))
