"""Activations with a known dictionary; imported by path from tests and from the processes that they start."""

import os
import signal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HELD_OUT = 1_000_000


class PlantedSource:
    """Batches of sparse sums of known unit directions, each a function of its number alone."""

    def __init__(
        self,
        *,
        d_in: int = 16,
        num_features: int = 24,
        firing: float = 0.08,
        batch_size: int = 256,
        scale: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(11)
        self.directions = torch.nn.functional.normalize(torch.randn(num_features, d_in, generator=generator), dim=1)
        self.d_in = d_in
        self.firing = firing
        self.batch_size = batch_size
        self.scale = scale
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.position = 0
        self.kill_at: int | None = None
        self.signal: int = signal.SIGKILL
        self.armed_after = 0
        self.read = 0
        self.nan_at: int | None = None

    def batch(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        shape = (self.batch_size, len(self.directions))
        codes = (torch.rand(shape, generator=generator) < self.firing) * (1 + torch.rand(shape, generator=generator))
        noise = 0.02 * torch.randn(self.batch_size, self.d_in, generator=generator)
        return self.scale * (codes @ self.directions + noise + 2.0)

    def next_batch(self) -> Tensor:
        self.read += 1
        if self.position == self.kill_at and self.read > self.armed_after:
            self.kill_at = None
            os.kill(os.getpid(), self.signal)
        x = self.batch(self.position)[self.share].clone()
        if self.position == self.nan_at:
            x[3] = float("nan")
        self.position += 1
        return x

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, object]) -> None:
        position = state["position"]
        assert isinstance(position, int)
        self.position = position


class PlantedView:
    """Tokens that no batch of the source holds."""

    def __init__(self, source: PlantedSource, num_batches: int = 16) -> None:
        self.x = torch.cat([source.batch(HELD_OUT + number) for number in range(num_batches)])
        self.d_in = source.d_in
        self.indices: npt.NDArray[np.int64] = np.arange(len(self.x))

    def read(self, indices: npt.NDArray[np.int64]) -> Tensor:
        return self.x[torch.from_numpy(indices)]


def mean_max_cosine(W_dec: Tensor, directions: Tensor) -> float:
    """Mean over the planted directions of the cosine with the nearest decoder row."""
    rows = torch.nn.functional.normalize(W_dec.detach(), dim=1)
    return float((directions @ rows.T).max(dim=1).values.mean())
