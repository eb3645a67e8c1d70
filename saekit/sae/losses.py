"""The terms an SAE is trained on, each a plain function of tensors, sparse where the code is sparse."""

from collections.abc import Callable

import torch
from saekit_kernels import auxk
from torch import Tensor

__all__ = [
    "auxk_loss",
    "jumprelu",
    "lp_penalty",
    "pre_act_loss",
    "quadratic_penalty",
    "reconstruction_loss",
    "step_penalty",
    "tanh_penalty",
]


def reconstruction_loss(error: Tensor, total_variance: float) -> Tensor:
    """Returns mean ||error||^2 / total_variance over error [N, d_in]: the fraction of variance unexplained.

    The denominator is a constant of the data, not of the batch, so that the loss is a mean over tokens: the same for any
    batch size, any number of processes and any scale of the activations.
    """
    return error.square().sum() / (error.shape[0] * total_variance)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, z: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.options = bandwidth, ste_to_input  # type: ignore[attr-defined]  # how torch keeps what is not a tensor
        return torch.where(z > threshold, z, 0.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth, ste_to_input = ctx.options  # type: ignore[attr-defined]
        near = (z - threshold).abs() < bandwidth / 2
        estimate = torch.where(near, threshold / bandwidth * grad, 0.0)
        grad_z = torch.where(z > threshold, grad, 0.0)
        return (grad_z + estimate if ste_to_input else grad_z), -estimate, None, None


def jumprelu(pre_acts: Tensor, threshold: Tensor, bandwidth: float, *, ste_to_input: bool = False) -> Tensor:
    """Returns `z * (z > threshold)` elementwise, with an estimated gradient to the threshold.

    d/d threshold = -(threshold / bandwidth) * [|z - threshold| < bandwidth / 2]; d/dz = [z > threshold], less the former where
    the estimate is to reach the input too.

    Source: Rajamanoharan et al. 2024, "Jumping ahead", equation 11; Anthropic, "Circuits updates - January 2025" (to the input).
    """
    result: Tensor = _JumpReLU.apply(pre_acts, threshold, bandwidth, ste_to_input)  # type: ignore[no-untyped-call]  # torch's own
    return result


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, z: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.options = bandwidth, ste_to_input  # type: ignore[attr-defined]  # how torch keeps what is not a tensor
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        z, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth, ste_to_input = ctx.options  # type: ignore[attr-defined]
        near = (z - threshold).abs() < bandwidth / 2
        estimate = torch.where(near, grad / bandwidth, 0.0)
        return (estimate if ste_to_input else None), -estimate, None, None


def step_penalty(
    pre_acts: Tensor, threshold: Tensor, bandwidth: float, *, num_tokens: int, ste_to_input: bool = False
) -> Tensor:
    """Returns L0, the number of entries above their threshold per token; its gradient is an estimate.

    d/d threshold of one entry = -(1 / bandwidth) * [|z - threshold| < bandwidth / 2]; d/dz is 0, or the opposite of it where
    the estimate is to reach the input too.

    Source: Rajamanoharan et al. 2024, equation 12.
    """
    active: Tensor = _Step.apply(pre_acts, threshold, bandwidth, ste_to_input)  # type: ignore[no-untyped-call]  # torch's own
    return active.sum() / num_tokens


def quadratic_penalty(
    pre_acts: Tensor,
    threshold: Tensor,
    bandwidth: float,
    *,
    offsets: Tensor,
    target_l0: float,
    ste_to_input: bool = False,
    total: Callable[[Tensor], Tensor] = lambda l0: l0,
) -> Tensor:
    """Returns the mean over tokens of (2 / target) * (active entries - target)^2, with the estimate of `step_penalty`.

    The price of one more active entry is then 4 * (l0 / target - 1): nothing at the target, and negative below it.

    Args:
        pre_acts: z of the stored entries [nnz].
        threshold: of each entry's feature [nnz].
        bandwidth: see `step_penalty`.
        offsets: where each token's entries begin [N + 1].
        target_l0: wanted number of active entries of a token.
        ste_to_input: see `step_penalty`.
        total: makes of each token's active entries [N] those of all its features, where some are elsewhere.

    Source: the target-L0 loss of Gemma Scope 2 in the form that SAELens 6.54 trains with.
    """
    active: Tensor = _Step.apply(pre_acts, threshold, bandwidth, ste_to_input)  # type: ignore[no-untyped-call]  # torch's own
    counts = offsets.diff()
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(active))
    l0 = total(active.new_zeros(len(counts)).index_add(0, row, active))
    excess: Tensor = (l0 - target_l0).square().sum()
    return excess * (2 / target_l0) / max(len(counts), 1)


def tanh_penalty(acts: Tensor, norms: Tensor, *, num_tokens: int, sharpness: float = 4.0) -> Tensor:
    """Returns the sum of tanh(sharpness * activation * decoder norm) per token, a smooth stand-in for L0.

    Source: Anthropic, "Circuits updates - January 2025", "Dictionary learning optimization techniques".
    """
    return torch.tanh(sharpness * acts * norms).sum() / num_tokens


def lp_penalty(acts: Tensor, *, p: float, num_tokens: int, softening: float = 1e-2) -> Tensor:
    """Returns the sum of `acts ** p` per token of positive activations; for p = 1 exactly their sum.

    Below p = 1 the slope at 0 has no bound, so the power is taken of `acts + softening`, less its value at 0.

    Source: Karvonen et al. 2024, arXiv 2408.00113, section 4; the softening is ours, in units of normalised activations.
    """
    if p == 1.0:
        return acts.sum() / num_tokens
    size: Tensor = ((acts + softening).pow(p) - softening**p).sum()
    return size / num_tokens


def auxk_loss(
    encoder_input: Tensor,
    residual: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    k_aux: int,
    residual_variance: Tensor,
    explain: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] = auxk,
) -> Tensor:
    """Returns how badly the k_aux largest dead features explain what the live ones left over.

    Only the dead features' own weights receive a gradient: input and residual are constants here, so live features and b_dec
    keep exactly the gradient of the reconstruction.

    Args:
        encoder_input: what the encoder multiplies [N, d_in].
        residual: x - x_hat of the live features [N, d_in].
        weights: of the dead features only: W_enc rows [n_dead, d_in], b_enc [n_dead], W_dec rows [n_dead, d_in].
        k_aux: dead features a token may use.
        residual_variance: mean ||residual - its mean||^2, a scalar; the loss is 1 where the dead features explain nothing.
        explain: what the dead features make of the input, as `saekit_kernels.auxk`; another where some of them are elsewhere.

    Source: Gao et al. 2024, appendix A.2.
    """
    W_enc, b_enc, W_dec = weights
    error = residual.detach() - explain(encoder_input.detach(), W_enc.T, b_enc, W_dec, k_aux)
    return error.square().sum() / (error.shape[0] * residual_variance.clamp_min(torch.finfo(error.dtype).tiny))


def pre_act_loss(
    input_sum: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    active: tuple[Tensor, Tensor],
    *,
    num_tokens: int,
) -> Tensor:
    """Returns the mean over tokens of the features' sum of `relu(threshold - z) * decoder norm`.

    The sum over silent tokens is the sum over all tokens, which needs only the summed input, less the few stored entries above
    the threshold: exact for any set of features, and no [N, F] array is made.

    Args:
        input_sum: sum over tokens of what the encoder multiplies [d_in].
        weights: of some or all features: W_enc rows [F, d_in], b_enc, threshold and decoder norm [F].
        active: stored entries of these features with z > threshold: z [m], and their place among the features [m] int64.
        num_tokens: tokens in the batch.

    Source: Anthropic, "Circuits updates - January 2025" (the loss, there over all features).
    """
    W_enc, b_enc, threshold, norm = weights
    z, place = active
    below = num_tokens * (threshold - b_enc) - W_enc @ input_sum
    above = torch.zeros_like(below).index_add(0, place, z - threshold[place])
    return ((below + above) * norm).sum() / num_tokens
