"""The truth: every primitive as plain dense torch, in the operands' own precision on any device.

Nothing here is fast and [N, F] arrays are made freely. `topk` and `threshold` are forward passes; the four sums are
the decode and, between them, every explicit gradient of the encoders and the decoder:

    decode      x_hat = gather_sum(values) + b_dec
                d values = gather_dot(g)       d W_dec = scatter_sum(values, g)        d b_dec = g.sum(0)
    encode_*    d x = gather_sum(d z)          d W_enc.T = scatter_sum(d z, x)         d b_enc = feature_sum(d z)

with d z the gradient of the stored values, zero where relu clipped.
"""

import torch
from torch import Tensor

from saekit_kernels._quantize import Kind, feature_bias, quantize, token_margin
from saekit_kernels.primitives import AdamStep, compute_dtype
from saekit_kernels.sparse_code import Entries, ReverseIndex


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """z = x @ weight.T + bias: [N, F] in the compute dtype."""
    dtype = compute_dtype(x, weight, bias)
    return x.to(dtype) @ weight.to(dtype).T + bias.to(dtype)


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Primitives.topk`."""
    z = pre_activations(x, weight, bias)
    ordered, order = torch.sort(z, dim=1, descending=True, stable=True)
    return ordered[:, :k].relu(), order[:, :k].contiguous()


def candidates(x: Tensor, weight: Tensor, bias: Tensor, count: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """See `Primitives.candidates`."""
    dtype = compute_dtype(x, weight, bias)
    tokens, features = quantize(x.to(dtype), kind), quantize(weight.to(dtype), kind)
    products = (tokens.codes.to(dtype) @ features.codes.to(dtype).T) * tokens.scale[:, None] * features.scale
    margin = (tokens.norm + tokens.rest)[:, None] * features.rest + token_margin(tokens, kind)[:, None] * features.norm
    bounds, columns = torch.topk(products + margin + feature_bias(bias.to(dtype), features), count, dim=1)
    return columns.sort(dim=1).values, torch.where(tokens.is_left_out, torch.inf, bounds[:, -1])


def threshold(x: Tensor, weight: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Primitives.threshold`."""
    z = pre_activations(x, weight, bias)
    is_kept = ~(z <= bound.to(z.dtype))
    offsets = torch.zeros(len(z) + 1, dtype=torch.int64, device=z.device)
    torch.cumsum(is_kept.sum(1), 0, out=offsets[1:])
    return z[is_kept], is_kept.nonzero()[:, 1].contiguous(), offsets


def gather_sum(
    values: Tensor, entries: Entries, weight: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """See `Primitives.gather_sum`."""
    compute = compute_dtype(values, weight, bias)
    out = dense(values.to(compute), entries, len(weight)) @ weight.to(compute)
    return (out if bias is None else out + bias.to(compute)).to(dtype)


def gather_dot(rows: Tensor, entries: Entries, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.gather_dot`."""
    compute = compute_dtype(rows, weight)
    products = rows.to(compute) @ weight.to(compute).T
    return products[entries.rows(), entries.indices].to(dtype)


def scatter_sum(values: Tensor, reverse: ReverseIndex, rows: Tensor, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.scatter_sum`."""
    compute = compute_dtype(values, rows)
    return (dense(values.to(compute), reverse.entries, reverse.num_features).T @ rows.to(compute)).to(dtype)


def feature_sum(values: Tensor, reverse: ReverseIndex, *, dtype: torch.dtype) -> Tensor:
    """See `Primitives.feature_sum`."""
    compute = compute_dtype(values)
    return dense(values.to(compute), reverse.entries, reverse.num_features).sum(0).to(dtype)


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
    compute = compute_dtype(weight, grad, *moments)
    w, g = weight.to(compute), grad.to(compute)
    mean, square = (moment.to(compute) for moment in moments)
    if step.is_unit_norm:
        g = without_part_along(g, w)
    g = g * scale
    mean = mean + (1.0 - step.beta1) * (g - mean)
    square = step.beta2 * square + (1.0 - step.beta2) * g * g
    w = w - step.step_size * mean / (square.sqrt() / step.root_correction + step.eps)
    if step.is_unit_norm:
        w = w / w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(compute).tiny)
    for kept, new in ((weight, w), (moments[0], mean), (moments[1], square), (shadow, w)):
        if kept is not None:
            kept.copy_(new)


def gradient_square(grad: Tensor, weight: Tensor | None) -> Tensor:
    """See `Primitives.gradient_square`."""
    g = grad.double()
    return (g if weight is None else without_part_along(g, weight.double())).square().sum()


def without_part_along(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient [R, D] less its part along each row of the weight, whose norm is 1."""
    return grad - (grad * weight).sum(1, keepdim=True) * weight


def dense(values: Tensor, entries: Entries, num_features: int) -> Tensor:
    """The code as [N, F]; values of entries that name the same place add up."""
    out = values.new_zeros(entries.num_rows, num_features)
    return out.index_put_((entries.rows(), entries.indices), values.reshape(-1), accumulate=True)
