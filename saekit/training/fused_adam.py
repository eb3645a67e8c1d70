"""Adam that reads and writes each row once: projection, clipping, the step and the renormalisation of unit rows together."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, overload

import torch
from saekit_kernels import AdamStep, adam_step, gradient_square
from torch import Tensor

from saekit.training.axis import Axis
from saekit.training.features import PER_FEATURE

__all__ = ["FusedAdam", "in_rows", "total_square"]


class FusedAdam(torch.optim.Optimizer):
    """Adam over named groups of one parameter each; state and groups have the names of torch.optim.Adam's.

    The gradients are left as they are: the parts along unit rows are removed, and the scale applied, on the way.

    Attributes:
        gradient_scale: what the next step multiplies every gradient by, 1 for as they are; a scalar tensor is not waited for.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        unit_rows: Collection[str] = (),
    ) -> None:
        """Takes groups with a `name` each.

        Args:
            groups: as for torch's optimizers.
            lr: learning rate of groups that have none of their own.
            betas: decay rates of the moments.
            eps: added to the root of the second moment.
            unit_rows: names of the groups whose matrix has rows of unit norm, and keeps them.
        """
        self.unit_rows = frozenset(unit_rows)
        self.gradient_scale: Tensor | float = 1.0
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def gradient_norm(self, latents: Axis | None = None) -> Tensor:
        """Returns the norm of all gradients together, projected and not yet scaled: a scalar, float64.

        Args:
            latents: processes that hold the other features; None = nobody.
        """
        squares = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    weight = in_rows(parameter, parameter)
                    rows = weight if group["name"] in self.unit_rows else None
                    squares[group["name"]] = gradient_square(in_rows(parameter.grad, parameter), rows)
        return total_square(squares, latents).sqrt()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        beta1, beta2 = group["betas"]
        step = AdamStep(
            lr=float(group["lr"]),
            number=int(state["step"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            is_unit_norm=group["name"] in self.unit_rows,
        )
        adam_step(
            in_rows(parameter, parameter),
            in_rows(parameter.grad, parameter),
            exp_avg=in_rows(state["exp_avg"], parameter),
            exp_avg_sq=in_rows(state["exp_avg_sq"], parameter),
            step=step,
            scale=self.gradient_scale,
        )


def total_square(squares: Mapping[str, Tensor], latents: Axis | None) -> Tensor:
    """Returns the sum of squares [] of named parts, those that belong to features over all processes that hold some."""
    if latents is None or latents.size == 1:
        return torch.stack(list(squares.values())).sum()
    own = [square.double() for name, square in squares.items() if name in PER_FEATURE]
    alike = [square.double() for name, square in squares.items() if name not in PER_FEATURE]
    return latents.sum(torch.stack(own).sum()) + torch.stack(alike).sum()


def in_rows(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns the view of a tensor in which the parameter's memory is in order: W_enc is a transposed [d_sae, d_in] array."""
    is_transposed = parameter.ndim == 2 and not parameter.is_contiguous()
    return (tensor.T if is_transposed else tensor).detach()
