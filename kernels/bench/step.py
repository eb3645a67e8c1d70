"""A whole TopK training step made of the ops alone, with every number that changes on the device: it can be captured in a CUDA graph."""

from typing import NamedTuple

import saekit_kernels as sk
import torch
from torch import Tensor


class Parameters(NamedTuple):
    """What a TopK SAE trains; W_enc_rows is [F, D]."""

    W_enc_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class TopKStep:
    """Loss, gradients, clipping by the exact norm, Adam, and unit rows of W_dec.

    Attributes:
        masters: the weights, float32, moved in place.
        lr: learning rate, a scalar tensor.
        number: how many steps were made, a scalar tensor.
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
        """Takes float32 weights; with another dtype, copies in it are what the encoder and decoder read."""
        self.masters = Parameters(*(tensor.detach() for tensor in masters))
        self.k = k
        self.backend: sk.Backend = backend
        copies = self.masters if dtype == torch.float32 else Parameters(*(tensor.to(dtype) for tensor in self.masters))
        self._leaves = Parameters(*(tensor.detach().requires_grad_() for tensor in copies))
        self._moments = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in self.masters]
        device = self.masters.W_dec.device
        self.lr = torch.full((), lr, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        """Moves the weights by one step on x [N, D]; returns the loss before it, a scalar on the device."""
        leaves, backend = self._leaves, self.backend
        code = sk.encode_topk(x, leaves.W_enc_rows.T, leaves.b_enc, self.k, backend=backend)
        x_hat = sk.decode(code.values, code.indices, leaves.W_dec, leaves.b_dec, backend=backend)
        loss = (x_hat - x).square().mean()
        gradients = Parameters(*torch.autograd.grad(loss, leaves))
        self.number.add_(1)
        unit_rows = (None, None, self.masters.W_dec, None)
        squares = [
            sk.gradient_square(gradient, rows, backend=backend)
            for gradient, rows in zip(gradients, unit_rows, strict=True)
        ]
        scale = (1.0 / torch.stack(squares).sum().sqrt()).clamp(max=1.0)
        parts = zip(self.masters, gradients, self._moments, leaves, unit_rows, strict=True)
        for master, gradient, moments, leaf, rows in parts:
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
