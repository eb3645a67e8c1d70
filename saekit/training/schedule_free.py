"""Schedule-free signum: steps of one size along the sign of the gradient, taken at an average that needs no decay."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

__all__ = ["ScheduleFreeSignum"]


class ScheduleFreeSignum(torch.optim.Optimizer):
    """Keeps, for each parameter, z that steps are taken from and x that averages it; gradients are taken between both.

        y = (1 - momentum) * z + momentum * x      the parameter itself, while training
        z = z - lr * sign(gradient at y)
        x = (1 - c) * x + c * z                    c = lr^2 / sum of lr^2 so far; what is evaluated and saved

    In a group with `has_unit_rows` all three are made unit row by row, so that each is a decoder on its own and none of them
    has to be told from the others; a row of `num_sites` parts has the sum of their norms for its size. Both z and x are stored: y alone would not give them back after that.

    Source: Defazio et al. 2024, "The road less scheduled", equations 1 to 3 and section 4.1 (the weights c); Bernstein et al.
    2018, "signSGD".
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.95) -> None:
        """Takes groups as of any optimizer, `has_unit_rows` among their keys where rows are held at unit norm."""
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "has_unit_rows": False, "num_sites": 1, "lr_square_sum": 0.0}
        )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient."""
        assert closure is None, "the loss is not evaluated again here"
        for group in self.param_groups:
            group["lr_square_sum"] += group["lr"] ** 2
            weight = group["lr"] ** 2 / group["lr_square_sum"] if group["lr_square_sum"] > 0 else 0.0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group, weight)
        return None

    def averages(self) -> dict[str, Tensor]:
        """Returns x by the name of its group; groups are of one parameter each."""
        return {
            group["name"]: self.state[parameter]["x"]
            for group in self.param_groups
            for parameter in group["params"]
            if "x" in self.state[parameter]
        }

    def _move(self, parameter: Tensor, group: dict[str, Any], weight: float) -> None:
        state = self.state[parameter]
        if not state:
            state["z"], state["x"] = parameter.detach().clone(), parameter.detach().clone()
        z, x = state["z"], state["x"]
        assert parameter.grad is not None
        z.sub_(parameter.grad.sign(), alpha=group["lr"])
        _make_unit(z, group)
        x.lerp_(z, weight)
        _make_unit(x, group)
        parameter.copy_(torch.lerp(z, x, group["momentum"]))
        _make_unit(parameter, group)


def _make_unit(rows: Tensor, group: dict[str, Any]) -> None:
    if group["has_unit_rows"]:
        size = rows.view(len(rows), group["num_sites"], -1).norm(dim=2).sum(1, keepdim=True)
        rows.div_(size.clamp_min(torch.finfo(rows.dtype).tiny))
