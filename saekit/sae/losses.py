"""The terms an SAE is trained on, each a plain function of tensors, sparse where the code is sparse."""

import torch
from torch import Tensor

__all__ = [
    "auxk_loss",
    "dead_pre_act_loss",
    "jumprelu",
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
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth  # type: ignore[attr-defined]  # how torch keeps what is not a tensor
        return torch.where(z > threshold, z, 0.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth: float = ctx.bandwidth  # type: ignore[attr-defined]
        near = (z - threshold).abs() < bandwidth / 2
        return torch.where(z > threshold, grad, 0.0), torch.where(near, -threshold / bandwidth * grad, 0.0), None


def jumprelu(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Returns `z * (z > threshold)` elementwise, with an estimated gradient to the threshold.

    d/d threshold = -(threshold / bandwidth) * [|z - threshold| < bandwidth / 2]; d/dz = [z > threshold].

    Source: Rajamanoharan et al. 2024, "Jumping ahead", equation 11.
    """
    result: Tensor = _JumpReLU.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call]  # torch's own
    return result


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth  # type: ignore[attr-defined]  # how torch keeps what is not a tensor
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors  # type: ignore[attr-defined]
        bandwidth: float = ctx.bandwidth  # type: ignore[attr-defined]
        near = (z - threshold).abs() < bandwidth / 2
        return None, torch.where(near, -grad / bandwidth, 0.0), None


def step_penalty(pre_acts: Tensor, threshold: Tensor, bandwidth: float, *, num_tokens: int) -> Tensor:
    """Returns L0, the number of entries above their threshold per token; its gradient reaches the thresholds only.

    d/d threshold of one entry = -(1 / bandwidth) * [|z - threshold| < bandwidth / 2].

    Source: Rajamanoharan et al. 2024, equation 12.
    """
    active: Tensor = _Step.apply(pre_acts, threshold, bandwidth)  # type: ignore[no-untyped-call]  # torch's own
    return active.sum() / num_tokens


def tanh_penalty(acts: Tensor, norms: Tensor, *, num_tokens: int, sharpness: float = 4.0) -> Tensor:
    """Returns the sum of tanh(sharpness * activation * decoder norm) per token, a smooth stand-in for L0.

    Source: Anthropic, "Circuits updates - January 2025", "Dictionary learning optimization techniques".
    """
    return torch.tanh(sharpness * acts * norms).sum() / num_tokens


def auxk_loss(
    encoder_input: Tensor,
    residual: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    k_aux: int,
    residual_variance: Tensor,
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

    Source: Gao et al. 2024, appendix A.2.
    """
    W_enc, b_enc, W_dec = weights
    residual = residual.detach()
    acts = (encoder_input.detach() @ W_enc.T + b_enc).relu()  # [N, n_dead]
    if k_aux < acts.shape[1]:
        values, indices = torch.topk(acts, k_aux, dim=-1, sorted=False)
        acts = torch.zeros_like(acts).scatter(1, indices, values)
    error = residual - acts @ W_dec
    return error.square().sum() / (error.shape[0] * residual_variance.clamp_min(torch.finfo(error.dtype).tiny))


def dead_pre_act_loss(
    input_sum: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    active: tuple[Tensor, Tensor],
    *,
    num_tokens: int,
) -> Tensor:
    """Returns the mean over tokens of the dead features' sum of `relu(threshold - z) * decoder norm`.

    A dead feature is silent on almost every token, so the sum over silent tokens is the sum over all tokens, which needs only
    the summed input, less the few stored entries above the threshold: no [N, n_dead] array is made.

    Args:
        input_sum: sum over tokens of what the encoder multiplies [d_in].
        weights: of the dead features only: W_enc rows [n_dead, d_in], b_enc, threshold and decoder norm [n_dead].
        active: stored entries of dead features with z > threshold: z [m], and their place among the dead features [m] int64.
        num_tokens: tokens in the batch.

    Source: Anthropic, "Circuits updates - January 2025" (the loss, there over all features).
    """
    W_enc, b_enc, threshold, norm = weights
    z, place = active
    below = num_tokens * (threshold - b_enc) - W_enc @ input_sum
    above = torch.zeros_like(below).index_add(0, place, z - threshold[place])
    return ((below + above) * norm).sum() / num_tokens
