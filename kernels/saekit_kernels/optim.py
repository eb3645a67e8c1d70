"""The optimizer pass of an SAE: projection, clipping, Adam, renormalisation and a copy, in one read and write of each row."""

import torch
from torch import Tensor

from saekit_kernels.backend import Backend, load_primitives, resolve_backend
from saekit_kernels.primitives import AdamStep


@torch.no_grad()
def adam_step(
    weight: Tensor,
    grad: Tensor,
    *,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamStep,
    scale: Tensor | float = 1.0,
    shadow: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Moves `weight` by one step of Adam, in place, together with what a dictionary of unit rows needs around it.

    With w a row of the weight, g of the gradient, m and v of the moments, t = step.number:

        g = g - <g, w> w                                 (only with step.is_unit_norm)
        g = scale g;  m = m + (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g^2
        w = w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
        w = w / ||w||                                    (only with step.is_unit_norm)
        shadow = w

    A NaN in the gradient reaches the moments and the weight; ask `gradient_square` before. `grad` is left as it is.

    Args:
        weight: [R, D], or any shape without step.is_unit_norm; contiguous, as are the moments and the shadow.
        grad: of the same shape, any layout.
        exp_avg: m, zeros before the first step.
        exp_avg_sq: v, zeros before the first step.
        step: learning rate, decay rates, number of the step.
        scale: what clipping multiplies the projected gradient by; a scalar tensor is not waited for on a device.
        shadow: a copy in another dtype, written from the new weight; None for none.
        backend: see `resolve_backend`.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit.
        BackendError: a forced backend cannot run.

    Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; Bricken et al. 2023, "Towards Monosemanticity", appendix on
    training (projection and renormalisation).
    """
    written = [exp_avg, exp_avg_sq] if shadow is None else [exp_avg, exp_avg_sq, shadow]
    _check("adam_step", weight, [grad, *written])
    for name, tensor in zip(("weight", "exp_avg", "exp_avg_sq", "shadow"), (weight, *written), strict=False):
        if not tensor.is_contiguous():
            raise ValueError(f"adam_step: {name} has strides {list(tensor.stride())}, needs contiguous memory")
    if step.is_unit_norm and weight.ndim != 2:
        raise ValueError(f"adam_step: weight is {list(weight.shape)}, needs [R, D] for rows of unit norm")
    primitives = load_primitives(resolve_backend(backend, weight, grad, exp_avg, exp_avg_sq))
    primitives.adam(weight, grad, (exp_avg, exp_avg_sq), step, scale=scale, shadow=shadow)


@torch.no_grad()
def gradient_square(grad: Tensor, weight: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """The sum of the squares of a gradient, as `adam_step` would see it before it is scaled.

    Args:
        grad: any shape and layout.
        weight: [R, D], the rows of unit norm along which the gradient's parts are left out; None for none.
        backend: see `resolve_backend`.

    Returns:
        A scalar, float64; NaN or Inf where the gradient has them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        BackendError: a forced backend cannot run.
    """
    if weight is not None:
        _check("gradient_square", weight, [grad])
        if weight.ndim != 2:
            raise ValueError(f"gradient_square: weight is {list(weight.shape)}, needs [R, D]")
    operands = [grad] if weight is None else [grad, weight]
    return load_primitives(resolve_backend(backend, *operands)).gradient_square(grad, weight)


def _check(where: str, weight: Tensor, others: list[Tensor]) -> None:
    for tensor in others:
        if tensor.shape != weight.shape or tensor.device != weight.device:
            found = f"{list(weight.shape)} on {weight.device} and {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{where}: {found}, needs one shape and device")
    if not all(tensor.is_floating_point() for tensor in (weight, *others)):
        raise ValueError(f"{where}: dtypes {[str(t.dtype) for t in (weight, *others)]}, needs floating point")
