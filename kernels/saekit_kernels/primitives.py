"""The primitives that every backend implements; the public ops and their backwards are made of nothing else."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saekit_kernels._quantize import Kind
from saekit_kernels.sparse_code import Entries, ReverseIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamStep:
    """What one step of Adam multiplies by.

    lr: learning rate; a scalar tensor is read on its device, so that a captured CUDA graph follows it.
    beta1, beta2: decay rates of the moments.
    eps: added to the root of the second moment.
    number: which step this is; 1 is the first. A scalar tensor as for lr.
    is_unit_norm: rows of the weight have norm 1, before and after.
    """

    lr: float | Tensor
    number: int | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    is_unit_norm: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.number, int) and self.number < 1:
            raise ValueError(f"adam_step: step.number is {self.number}, needs 1 for the first step")

    @property
    def step_size(self) -> float | Tensor:
        """The learning rate over the first moment's bias correction."""
        return self.lr / (1.0 - self._power(self.beta1))

    @property
    def root_correction(self) -> float | Tensor:
        """The root of the second moment's bias correction."""
        rest = 1.0 - self._power(self.beta2)
        return rest.sqrt() if isinstance(rest, Tensor) else math.sqrt(rest)

    def _power(self, beta: float) -> float | Tensor:
        number = self.number
        # float64: close to 1, a power in float32 would leave few digits of what it lacks to 1.
        return torch.pow(beta, number.double()) if isinstance(number, Tensor) else float(beta**number)


class Primitives(Protocol):
    """What a backend module provides. Sums are accumulated in `compute_dtype` of the operands."""

    def topk(self, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """relu of the k largest of x @ weight.T + bias per row, and their columns.

        Args:
            x: [N, D].
            weight: [F, D].
            bias: [F].
            k: 1 to F.

        Returns:
            values [N, k] in the compute dtype and indices [N, k] int64, largest first, equal ones by rising index;
            NaN ranks above every number.
        """

    def candidates(self, x: Tensor, weight: Tensor, bias: Tensor, count: int, kind: Kind) -> tuple[Tensor, Tensor]:
        """The entries of z = x @ weight.T + bias whose upper bounds, from 8-bit products, are largest in each row.

        Args:
            x: [N, D].
            weight: [F, D].
            bias: [F].
            count: 1 to F.
            kind: in which eight bits.

        Returns:
            columns [N, count] int64, rising in each row, and a number that no entry outside them exceeds [N]; +inf for
            rows that cannot be scored.
        """

    def threshold(self, x: Tensor, weight: Tensor, bias: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of z = x @ weight.T + bias that are not <= bound [F]: pre_acts [nnz], indices [nnz], offsets [N + 1]."""

    def gather_sum(
        self, values: Tensor, entries: Entries, weight: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype
    ) -> Tensor:
        """out[n] = sum over the row's entries e of values[e] * weight[index(e)], plus bias: [N, D] in `dtype`."""

    def gather_dot(self, rows: Tensor, entries: Entries, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
        """out[e] = <rows[row(e)], weight[index(e)]>: [nnz] in `dtype`."""

    def scatter_sum(self, values: Tensor, reverse: ReverseIndex, rows: Tensor, *, dtype: torch.dtype) -> Tensor:
        """out[f] = sum over the entries e of feature f of values[e] * rows[row(e)]: [F, D] contiguous, in `dtype`."""

    def feature_sum(self, values: Tensor, reverse: ReverseIndex, *, dtype: torch.dtype) -> Tensor:
        """out[f] = sum of values over the entries of feature f: [F] in `dtype`."""

    def adam(
        self,
        weight: Tensor,
        grad: Tensor,
        moments: tuple[Tensor, Tensor],
        step: AdamStep,
        *,
        scale: Tensor | float,
        shadow: Tensor | None,
    ) -> None:
        """One step of Adam in place, see `adam_step`; all but `grad` are contiguous."""

    def gradient_square(self, grad: Tensor, weight: Tensor | None) -> Tensor:
        """Sum of squares of `grad`, less its parts along the rows of `weight`: a float64 scalar."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if an operand is float64, else float32: what sums are accumulated in and codes are returned in."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which products run in the operands' own precision, whatever autocast the caller is under."""
    context: AbstractContextManager[None] = torch.autocast(tensor.device.type, enabled=False)
    return context
