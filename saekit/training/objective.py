"""One step's loss of an SAE in normalised activations, computed from the selected entries alone."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from saekit_kernels import decode, encode_threshold, encode_topk
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.base import SAE
from saekit.sae.batchtopk import BatchTopKSAE, encode_batch_topk
from saekit.sae.jumprelu import JumpReLUSAE
from saekit.sae.losses import auxk_loss, dead_pre_act_loss, jumprelu, reconstruction_loss, step_penalty, tanh_penalty
from saekit.sae.topk import TopKSAE
from saekit.training.config import TrainConfig

__all__ = [
    "JumpReLUObjective",
    "Objective",
    "StepResult",
    "SumOverProcesses",
    "TopKObjective",
    "build_objective",
    "default_k_aux",
]

SumOverProcesses = Callable[[Tensor], Tensor]

THRESHOLD_MEMORY_STEPS = 100
"""Steps over which BatchTopK's threshold is averaged, an order more than the batch-to-batch noise needs."""


class StepResult(NamedTuple):
    """What one batch gave, on this process."""

    loss: Tensor
    """What is minimised, a scalar with a graph."""
    fvu: Tensor
    """Its reconstruction term, a scalar."""
    auxiliary: Tensor
    """Its term for dead features before weighting, a scalar; 0 while none is dead."""
    num_active: Tensor
    """Active entries in the batch, a scalar."""
    fired: Tensor
    """Which features were active on any token [F] bool."""


class _Code(NamedTuple):
    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    penalty: Tensor | float
    pre_acts: Tensor | None


def default_k_aux(d_in: int) -> int:
    """Returns the power of two nearest to d_in / 2 (Gao et al. 2024, appendix A.2)."""
    return 1 << max(0, round(math.log2(d_in / 2)))


class Objective(nn.Module, ABC):
    """An SAE of normalised activations together with the terms it is trained on."""

    def __init__(
        self, sae: SAE, config: TrainConfig, *, total_variance: float, sum_over_processes: SumOverProcesses
    ) -> None:
        super().__init__()
        self.sae = sae
        self.config = config
        self.total_variance = total_variance
        self.sum_over_processes = sum_over_processes
        self.k_aux = config.k_aux or default_k_aux(sae.d_in)

    @abstractmethod
    def encode(self, encoder_input: Tensor, coefficient: float) -> _Code:
        """Returns the selected entries of encoder_input [N, d_in], and the weighted sparsity penalty."""

    def forward(self, x: Tensor, dead: Tensor, coefficient: float = 0.0) -> StepResult:
        """Returns loss and figures of normalised activations x [N, d_in].

        Args:
            x: a batch, the same number of tokens on every process.
            dead: indices of the dead features [n_dead] int64, the same on every process.
            coefficient: weight of the sparsity penalty.
        """
        encoder_input = self.sae.encoder_input(x)
        code = self.encode(encoder_input, coefficient)
        x_hat = decode(code.values, code.indices, self.sae.W_dec, self.sae.b_dec, offsets=code.offsets)
        error = x - x_hat
        fvu = reconstruction_loss(error, self.total_variance)
        auxiliary, weighted = self.dead_loss(encoder_input, error, dead, code)
        active = code.values > 0
        fired = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=x.device)
        fired[code.indices[active]] = True
        return StepResult(fvu + code.penalty + weighted, fvu.detach(), auxiliary, active.sum(), fired)

    def dead_loss(self, encoder_input: Tensor, error: Tensor, dead: Tensor, code: _Code) -> tuple[Tensor, Tensor]:
        """Returns the term that brings dead features back, bare and weighted; exactly 0 when none is dead."""
        if dead.numel() == 0 or self.config.auxk_alpha == 0:
            nothing = error.new_zeros(())
            return nothing, nothing
        residual = error.detach()
        # One sum for all processes, so that the loss does not depend on how the batch is split over them.
        sums = torch.cat([residual.sum(0).double(), residual.square().sum().double()[None]])
        count = self.sum_over_processes(torch.tensor(float(len(error)), dtype=torch.float64, device=error.device))
        sums = self.sum_over_processes(sums) / count
        variance = (sums[-1] - sums[:-1].square().sum()).to(error.dtype)
        # Rows of the compacted dead features: a dense product of their width is cheaper than gathering k_aux rows a token.
        weights = (self.sae.W_enc.T[dead], self.sae.b_enc[dead], self.sae.W_dec[dead])
        loss = auxk_loss(encoder_input, residual, weights, k_aux=self.k_aux, residual_variance=variance)
        return loss.detach(), self.config.auxk_alpha * loss

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what the optimizer moves, by name."""
        return {"W_enc": self.sae.W_enc, "b_enc": self.sae.b_enc, "W_dec": self.sae.W_dec, "b_dec": self.sae.b_dec}

    def after_step(self) -> None:
        """Restores what a step must keep: unit decoder rows."""
        self.sae.normalize_decoder()


class TopKObjective(Objective):
    """Reconstruction and AuxK."""

    sae: TopKSAE

    def encode(self, encoder_input: Tensor, coefficient: float) -> _Code:
        """Returns the k largest entries of each token; there is nothing to penalise."""
        values, indices = encode_topk(encoder_input, self.sae.W_enc, self.sae.b_enc, self.sae.cfg.k)
        return _Code(values, indices, None, 0.0, None)


class BatchTopKObjective(Objective):
    """Reconstruction and AuxK; the inference threshold follows the smallest entry that a batch keeps.

    With several processes each keeps the largest entries of its own share of the batch; the thresholds are averaged.
    """

    sae: BatchTopKSAE

    def __init__(
        self, sae: BatchTopKSAE, config: TrainConfig, *, total_variance: float, sum_over_processes: SumOverProcesses
    ) -> None:
        super().__init__(sae, config, total_variance=total_variance, sum_over_processes=sum_over_processes)
        self.register_buffer("smallest_kept", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("num_seen", torch.zeros(1, dtype=torch.int64))
        self.smallest_kept: Tensor
        self.num_seen: Tensor

    def encode(self, encoder_input: Tensor, coefficient: float) -> _Code:
        """Returns the N * k largest entries of the batch; there is nothing to penalise."""
        values, indices, offsets = encode_batch_topk(encoder_input, self.sae.W_enc, self.sae.b_enc, self.sae.cfg.k)
        own = values.detach().double().min() if values.numel() else encoder_input.new_zeros((), dtype=torch.float64)
        both = self.sum_over_processes(torch.stack([own, torch.ones_like(own)]))
        self.smallest_kept.copy_(both[0] / both[1])
        return _Code(values, indices, offsets, 0.0, None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Restores unit decoder rows and moves the threshold towards the smallest entry kept in this batch."""
        super().after_step()
        self.num_seen += 1
        # A plain mean at first, so that the threshold's start does not matter; then a running one that follows the weights.
        weight = max(1.0 / float(self.num_seen), 1.0 / THRESHOLD_MEMORY_STEPS)
        self.sae.threshold.lerp_(self.smallest_kept.to(self.sae.threshold), weight)


class JumpReLUObjective(Objective):
    """Reconstruction, a weighted sparsity penalty and a term for dead features.

    The thresholds are trained as logarithms: they stay positive, and a step changes each by the same relative amount.
    """

    sae: JumpReLUSAE

    def __init__(
        self, sae: JumpReLUSAE, config: TrainConfig, *, total_variance: float, sum_over_processes: SumOverProcesses
    ) -> None:
        super().__init__(sae, config, total_variance=total_variance, sum_over_processes=sum_over_processes)
        self.log_threshold = nn.Parameter(sae.threshold.detach().clamp_min(1e-6).log())

    def encode(self, encoder_input: Tensor, coefficient: float) -> _Code:
        """Returns the entries above or near their threshold (near ones with value 0), and the penalty."""
        cfg = self.sae.cfg
        threshold = self.log_threshold.exp()
        pre_acts, indices, offsets = encode_threshold(
            encoder_input, self.sae.W_enc, self.sae.b_enc, threshold, bandwidth=cfg.bandwidth
        )
        at = threshold[indices]
        values = jumprelu(pre_acts, at, cfg.bandwidth)
        num_tokens = len(encoder_input)
        if cfg.sparsity == "step":
            penalty = step_penalty(pre_acts, at, cfg.bandwidth, num_tokens=num_tokens)
        else:
            penalty = tanh_penalty(values, self.sae.W_dec.norm(dim=1)[indices], num_tokens=num_tokens)
        return _Code(values, indices, offsets, coefficient * penalty, pre_acts)

    def dead_loss(self, encoder_input: Tensor, error: Tensor, dead: Tensor, code: _Code) -> tuple[Tensor, Tensor]:
        """Returns AuxK or the pre-activation loss of the dead features, bare and weighted."""
        if self.config.sparsity.dead_loss == "auxk" or dead.numel() == 0:
            return super().dead_loss(encoder_input, error, dead, code)
        assert code.pre_acts is not None
        place = torch.full((self.sae.d_sae,), -1, device=dead.device)
        place[dead] = torch.arange(len(dead), device=dead.device)
        kept = (place[code.indices] >= 0) & (code.values > 0)
        weights = (
            self.sae.W_enc.T[dead],
            self.sae.b_enc[dead],
            self.log_threshold.exp()[dead],
            self.sae.W_dec[dead].norm(dim=1),
        )
        active = (code.pre_acts[kept], place[code.indices[kept]])
        loss = dead_pre_act_loss(encoder_input.sum(0), weights, active, num_tokens=len(encoder_input))
        return loss.detach(), self.config.sparsity.pre_act_coefficient * loss

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what the optimizer moves, by name; the SAE's own thresholds follow the logarithms."""
        return super().trained_parameters() | {"log_threshold": self.log_threshold}

    @torch.no_grad()
    def after_step(self) -> None:
        """Restores unit decoder rows and sets the SAE's thresholds to the trained ones."""
        super().after_step()
        self.sae.threshold.copy_(self.log_threshold.exp())


def build_objective(
    sae: SAE, config: TrainConfig, *, total_variance: float, sum_over_processes: SumOverProcesses
) -> Objective:
    """Returns the objective of the SAE's architecture.

    Raises:
        ConfigError: no objective belongs to it, or a JumpReLU SAE has no target L0.
    """
    if isinstance(sae, TopKSAE):
        return TopKObjective(sae, config, total_variance=total_variance, sum_over_processes=sum_over_processes)
    if isinstance(sae, BatchTopKSAE):
        return BatchTopKObjective(sae, config, total_variance=total_variance, sum_over_processes=sum_over_processes)
    if isinstance(sae, JumpReLUSAE):
        if sae.cfg.target_l0 is None:
            raise ConfigError("sae: no target_l0, needs one to train a JumpReLU SAE")
        return JumpReLUObjective(sae, config, total_variance=total_variance, sum_over_processes=sum_over_processes)
    raise ConfigError(f"sae: {type(sae).__name__} cannot be trained, needs TopKSAE, BatchTopKSAE or JumpReLUSAE")
