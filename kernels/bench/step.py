"""Whole training steps made of the ops alone, as the trainer makes them: TopK, BatchTopK and JumpReLU.

Every number that changes is on the device. TopK's step never waits for it and can be captured in a CUDA graph; the encoders of the
other two wait for the number of entries that they keep.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import saekit_kernels as sk
import torch
from torch import Tensor

__all__ = ["BatchTopKStep", "JumpReLUStep", "Parameters", "Step", "TopKStep"]


class Parameters(NamedTuple):
    """What an SAE trains; W_enc_rows is [F, D]."""

    W_enc_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    log_threshold: Tensor | None = None
    """[F], of JumpReLU."""

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [tensor for tensor in self if tensor is not None]


class Step(ABC):
    """Loss, gradients, clipping by the exact norm, Adam, and unit rows of W_dec.

    Attributes:
        masters: the weights, float32, moved in place.
        lr: learning rate, a scalar tensor.
        number: how many steps were made, a scalar tensor.
    """

    def __init__(
        self,
        masters: Parameters,
        *,
        dtype: torch.dtype = torch.float32,
        lr: float = 3e-4,
        backend: sk.Backend = "auto",
    ) -> None:
        """Takes float32 weights; with another dtype, copies in it are what the encoder and decoder read."""
        self.masters = Parameters(*(None if tensor is None else tensor.detach() for tensor in masters))
        self.backend: sk.Backend = backend
        # Thresholds stay in float32: a step moves them by less than a unit in the last place of bfloat16.
        copies = Parameters(*(tensor.to(dtype) for tensor in self.masters[:4]), self.masters.log_threshold)
        self.leaves = Parameters(*(None if tensor is None else tensor.detach().requires_grad_() for tensor in copies))
        self._moments = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in self.masters.tensors()]
        device = self.masters.W_dec.device
        self.lr = torch.full((), lr, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def num_state_bytes(self) -> int:
        """Weights, their copies in another dtype, and both moments."""
        pairs = zip(self.masters.tensors(), self.leaves.tensors(), strict=True)
        return sum(3 * one.nbytes + (0 if one.dtype == leaf.dtype else leaf.nbytes) for one, leaf in pairs)

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """What is minimised on x [N, D], a scalar with its graph."""

    def __call__(self, x: Tensor) -> Tensor:
        """Moves the weights by one step on x [N, D]; returns the loss before it, a scalar on the device."""
        backend = self.backend
        masters, leaves = self.masters.tensors(), self.leaves.tensors()
        loss = self.loss(x)
        gradients = torch.autograd.grad(loss, leaves)
        self.number.add_(1)
        unit_rows = [master if master is self.masters.W_dec else None for master in masters]
        squares = [
            sk.gradient_square(gradient, rows, backend=backend)
            for gradient, rows in zip(gradients, unit_rows, strict=True)
        ]
        scale = (1.0 / torch.stack(squares).sum().sqrt()).clamp(max=1.0)
        for master, gradient, moments, leaf, rows in zip(
            masters, gradients, self._moments, leaves, unit_rows, strict=True
        ):
            sk.adam_step(
                master,
                gradient,
                exp_avg=moments[0],
                exp_avg_sq=moments[1],
                step=sk.AdamStep(lr=self.lr, number=self.number, is_unit_norm=rows is not None),
                scale=scale,
                shadow=None if leaf.dtype == master.dtype else leaf.detach(),
                backend=backend,
            )
        return loss.detach()

    def _error(self, x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        leaves = self.leaves
        x_hat = sk.decode(values, indices, leaves.W_dec, leaves.b_dec, offsets=offsets, backend=self.backend)
        return (x_hat - x).square().mean()


class TopKStep(Step):
    """A step of an SAE of which every token keeps its k largest features."""

    def __init__(
        self,
        masters: Parameters,
        k: int,
        *,
        dtype: torch.dtype = torch.float32,
        lr: float = 3e-4,
        backend: sk.Backend = "auto",
    ) -> None:
        super().__init__(masters, dtype=dtype, lr=lr, backend=backend)
        self.k = k

    def loss(self, x: Tensor) -> Tensor:
        """The mean squared error."""
        leaves = self.leaves
        code = sk.encode_topk(x, leaves.W_enc_rows.T, leaves.b_enc, self.k, backend=self.backend)
        return self._error(x, code.values, code.indices)


class BatchTopKStep(TopKStep):
    """A step of an SAE of which a batch keeps its N * k largest features.

    Attributes:
        threshold: the running mean of the smallest entry that a batch keeps, a scalar.
    """

    def __init__(
        self,
        masters: Parameters,
        k: int,
        *,
        dtype: torch.dtype = torch.float32,
        lr: float = 3e-4,
        backend: sk.Backend = "auto",
    ) -> None:
        super().__init__(masters, k, dtype=dtype, lr=lr, backend=backend)
        self.threshold = torch.zeros_like(self.lr)

    def loss(self, x: Tensor) -> Tensor:
        """The mean squared error; the threshold follows."""
        leaves = self.leaves
        values, indices, offsets = sk.encode_batch_topk(
            x, leaves.W_enc_rows.T, leaves.b_enc, self.k, backend=self.backend
        )
        if len(values):
            self.threshold.lerp_(values.detach().min().to(self.threshold), 0.01)
        return self._error(x, values, indices, offsets)


class JumpReLUStep(Step):
    """A step of a JumpReLU SAE with the step penalty; its thresholds are trained as logarithms by straight-through estimates.

    Source: Rajamanoharan et al. 2024, "Jumping ahead", equations 11 and 12.
    """

    def __init__(
        self,
        masters: Parameters,
        *,
        bandwidth: float = 1e-3,
        coefficient: float = 1e-3,
        dtype: torch.dtype = torch.float32,
        lr: float = 3e-4,
        backend: sk.Backend = "auto",
    ) -> None:
        """Takes weights with `log_threshold`; `coefficient` is what one active entry of a token costs."""
        super().__init__(masters, dtype=dtype, lr=lr, backend=backend)
        self.bandwidth = bandwidth
        self.coefficient = coefficient

    def loss(self, x: Tensor) -> Tensor:
        """The mean squared error and the price of the active entries."""
        leaves, bandwidth = self.leaves, self.bandwidth
        assert leaves.log_threshold is not None
        threshold = leaves.log_threshold.exp()
        pre_acts, indices, offsets = sk.encode_threshold(
            x, leaves.W_enc_rows.T, leaves.b_enc, threshold, bandwidth=bandwidth, backend=self.backend
        )
        at = threshold[indices]
        edge = at.detach()
        is_active = pre_acts.detach() > edge
        # 0, with the gradient that the estimators give an entry near its threshold.
        moved = torch.where((pre_acts.detach() - edge).abs() < bandwidth / 2, (edge - at) / bandwidth, 0.0)
        values = torch.where(is_active, pre_acts, 0.0) + edge * moved
        l0 = (is_active + moved).sum() / len(x)
        return self._error(x, values, indices, offsets) + self.coefficient * l0
