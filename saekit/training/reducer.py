"""Gradients that are averaged over processes once a step, each while the backward still makes the others."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from saekit.training.axis import Axis
from saekit.training.fused_adam import in_rows

__all__ = ["GradientReducer"]

FIRST = ("W_dec", "W_skip", "W_enc")
"""The order in which a backward ends them; every process sends in this one order, so that none waits for another's turn."""


class GradientReducer:
    """Sums gradients over processes in the background, begun in the last backward of a step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], axis: Axis) -> None:
        """Takes the parameters of which every process along the axis has a copy."""
        self._axis = axis
        first = [name for name in FIRST if name in parameters]
        self._order = [parameters[name] for name in (*first, *(name for name in parameters if name not in first))]
        self._ready: set[nn.Parameter] = set()
        self._work: list[dist.Work | None] = []
        self._is_armed = False
        self._weight = torch.ones(())
        if axis.size > 1:
            for parameter in self._order:
                parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]  # torch's own

    def arm(self, weight: float) -> None:
        """Says that the next backward is the last one of the step.

        Args:
            weight: of this process's gradients; those of all are divided by the sum of the weights.
        """
        self._ready, self._work, self._is_armed = set(), [], True
        self._weight = torch.full((), weight, dtype=torch.float64, device=self._order[0].device)
        self._weight_work = self._axis.start_sum(self._weight, "figures")

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Waits for what was begun, divides by the weights, and returns their sum [] float64."""
        assert self._is_armed, "a step without a last backward"
        self._is_armed = False
        if self._axis.size == 1:
            return self._weight
        for parameter in self._order:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ready.update(self._order)
        self._send()
        for work in (self._weight_work, *self._work):
            if work is not None:
                work.wait()
        for parameter in self._order:
            assert parameter.grad is not None
            parameter.grad.div_(self._weight.to(parameter.grad.dtype))
        return self._weight

    def _note(self, parameter: Tensor) -> None:
        if self._is_armed:
            assert isinstance(parameter, nn.Parameter)
            self._ready.add(parameter)
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Begins to sum every gradient that is complete and whose turn it is."""
        while len(self._work) < len(self._order) and self._order[len(self._work)] in self._ready:
            parameter = self._order[len(self._work)]
            assert parameter.grad is not None
            # Collectives want memory in order, and W_enc is a transposed view.
            if not in_rows(parameter.grad, parameter).is_contiguous():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            self._work.append(self._axis.start_sum(in_rows(parameter.grad, parameter), "gradients"))
