"""Muon: matrices move by their momentum with all singular values set to about one, everything else by Adam."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalize"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
TYPICAL_UPDATE = 0.2
"""Root mean square of Adam's updates (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2)."""


def orthogonalize(matrix: Tensor) -> Tensor:
    """Returns a matrix of the same singular vectors with singular values near 1 (0.7 to 1.2).

    The iteration works on the smaller Gram matrix, [d, d] for a dictionary of d-wide rows.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the quintic's coefficients).
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if is_tall else matrix
    x = x / (x.norm() + torch.finfo(x.dtype).tiny)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised and scaled to the size of Adam's updates, for matrices; Adam for vectors.

    With that scale the learning rates of Adam carry over.

    Source: Jordan et al. 2024 (as above); Liu et al. 2025, arXiv 2502.16982, equation 4 (the scale 0.2 * sqrt(largest side)).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Takes groups as of any optimizer; `betas` and `eps` are Adam's."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient."""
        assert closure is None, "the loss is not evaluated again here"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move = self._move_matrix if parameter.ndim == 2 else self._move_vector
                    move(parameter, parameter.grad, group)
        return None

    def _move_matrix(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(torch.lerp(gradient, momentum, group["momentum"]))
        parameter.sub_(update, alpha=group["lr"] * TYPICAL_UPDATE * max(parameter.shape) ** 0.5)

    def _move_vector(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first_decay, second_decay = group["betas"]
        first = state["first"].lerp_(gradient, 1 - first_decay)
        second = state["second"].lerp_(gradient.square(), 1 - second_decay)
        size = (second / (1 - second_decay ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, size, value=-group["lr"] / (1 - first_decay ** state["step"]))
