"""Averaged weights: what is evaluated and saved in place of the weights that gradients are taken at."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.training.features import PER_FEATURE, by_feature
from saekit.training.objective import Objective
from saekit.training.schedule_free import ScheduleFreeSignum

__all__ = ["WeightAverage"]


class WeightAverage:
    """The exponential moving average of the trained parameters, or the average that a schedule-free optimizer keeps itself.

    Attributes:
        is_on: whether there is any average; without one, the weights themselves are evaluated and saved.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, *, decay: float | None) -> None:
        """Starts at the present weights; a decay of None keeps no moving average."""
        self._objective = objective
        self._optimizer = optimizer
        self._decay = decay
        self._num_updates = 0
        self._ema = {name: p.detach().clone() for name, p in self._parameters().items()} if decay is not None else {}
        self.is_on = decay is not None or isinstance(optimizer, ScheduleFreeSignum)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights after a step.

        At first the decay is (1 + n) / (10 + n) after n updates, so that the random start is forgotten soon.

        Source: the rule of TensorFlow's ExponentialMovingAverage with `num_updates`.
        """
        if self._decay is None:
            return
        self._num_updates += 1
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        for name, value in self._parameters().items():
            self._ema[name].lerp_(value, 1 - decay)

    @torch.no_grad()
    def restart(self, features: Tensor) -> None:
        """Lets the moving average of some features [n] be what they are now; that of an optimizer is the optimizer's."""
        for name in self._ema.keys() & PER_FEATURE:
            by_feature(name, self._ema[name])[features] = by_feature(name, self._parameters()[name])[features]

    @torch.no_grad()
    def take(self) -> None:
        """Puts the average, where there is one, in place of the weights for good."""
        if not self.is_on:
            return
        for name, value in self._averages().items():
            self._parameters()[name].copy_(value)
        self._objective.settle()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Puts the average in place of the weights within the block; they are the same bits afterwards."""
        if not self.is_on:
            yield
            return
        weights = {name: value.clone() for name, value in self._objective.state_dict().items()}
        self.take()
        try:
            yield
        finally:
            self._objective.load_state_dict(weights)

    def state_dict(self) -> dict[str, object]:
        """Returns the exact state; that of an optimizer's own average is the optimizer's."""
        return {"num_updates": self._num_updates, "ema": dict(self._ema)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self._num_updates = state["num_updates"]
        for name, value in self._ema.items():
            value.copy_(state["ema"][name])

    def _parameters(self) -> Mapping[str, Tensor]:
        return {name: parameter.data for name, parameter in self._objective.trained_parameters().items()}

    def _averages(self) -> Mapping[str, Tensor]:
        if self._decay is not None:
            return self._ema
        return self._optimizer.averages() if isinstance(self._optimizer, ScheduleFreeSignum) else {}
