"""AdamW whose moments take one byte an entry, from the optional package bitsandbytes."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from saekit.errors import MissingDependencyError
from saekit.training.fused_adam import in_rows

__all__ = ["LowBitAdamW", "check_low_bit"]

QUANTISED_FROM = 4096
"""Entries from which on a parameter's moments are quantised; those of biases of narrow SAEs stay in float32."""


def check_low_bit() -> None:
    """Checks that the package is installed.

    Raises:
        MissingDependencyError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "training: optimizer 'adamw8bit', needs the package bitsandbytes; pip install 'saekit[lowbit]'"
        )


class LowBitAdamW(torch.optim.Optimizer):
    """AdamW with block-wise quantised moments, over named groups of one parameter each.

    Blocks of 256 entries follow the parameter's memory, so that those of W_enc lie within features.

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"; Loshchilov and Hutter 2019 (the decay).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        """Takes groups as of any optimizer; the decay is that of matrices, vectors have none.

        Raises:
            MissingDependencyError: bitsandbytes is not installed.
        """
        check_low_bit()
        from bitsandbytes.optim import AdamW8bit

        super().__init__(groups, {"lr": lr, "betas": betas})
        # The package makes every parameter contiguous, which would part W_enc from the memory of its features: it works on
        # views in which memory is in order.
        self._views = {
            parameter: nn.Parameter(in_rows(parameter.detach(), parameter))
            for group in self.param_groups
            for parameter in group["params"]
        }
        inner = [
            {
                "params": [self._views[parameter] for parameter in group["params"]],
                "weight_decay": weight_decay if group["params"][0].ndim == 2 else 0.0,
            }
            for group in self.param_groups
        ]
        self._inner: torch.optim.Optimizer = AdamW8bit(inner, lr=lr, betas=betas, min_8bit_size=QUANTISED_FROM)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient."""
        assert closure is None, "the loss is not evaluated again here"
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"] = group["lr"]
            for parameter in group["params"]:
                gradient = parameter.grad
                self._views[parameter].grad = None if gradient is None else in_rows(gradient, parameter).contiguous()
        self._inner.step()
        for view in self._views.values():
            view.grad = None
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns the exact state."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self._inner.load_state_dict(dict(state_dict))

    @torch.no_grad()
    def clear_features(self, parameter: nn.Parameter, features: Tensor) -> None:
        """Sets the moments of some features to zero.

        Args:
            parameter: one of the optimizer's.
            features: indices [n] int64 of rows of its memory.
        """
        state = self._inner.state[self._views[parameter]]
        for number in ("1", "2"):
            moment = state.get(f"state{number}")
            if moment is None:
                continue
            codes = state.get(f"qmap{number}")
            # Quantised values are places in a table, which holds 0 exactly.
            zero = 0.0 if codes is None else int(codes.abs().argmin())
            moment.view(len(self._views[parameter]), -1)[features] = zero
