"""Sums over processes inside a graph: each process holds some of the features of one and the same loss."""

from typing import Any

import torch
from torch import Tensor

from saekit.training.axis import Axis

__all__ = ["shared", "total"]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis, purpose: str) -> Tensor:
        return axis.sum(value, purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Every process computes the same loss of the sum: its gradient is that of each of the terms.
        return grads[0], None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, axis: Axis, purpose: str) -> Tensor:
        ctx.axis, ctx.purpose = axis, purpose
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.sum(grads[0], ctx.purpose), None, None


def total(axis: Axis, value: Tensor, purpose: str = "reconstructions") -> Tensor:
    """Returns the sum over processes of what each one's features add, of which all make the same loss."""
    if axis.size == 1:
        return value
    result: Tensor = _Total.apply(value, axis, purpose)  # type: ignore[no-untyped-call]  # torch's own
    return result


def shared(axis: Axis, value: Tensor) -> Tensor:
    """Returns a tensor that all processes have alike, of which each one's features take gradients: these are added up."""
    if axis.size == 1:
        return value
    result: Tensor = _Shared.apply(value, axis, "biases")  # type: ignore[no-untyped-call]  # torch's own
    return result
