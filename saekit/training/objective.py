"""One step's loss of an SAE in normalised activations, computed from the selected entries alone."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from saekit_kernels import decode, encode_threshold, encode_topk
from torch import Tensor, nn

from saekit.sae.base import SAE
from saekit.sae.batch import split_batch
from saekit.sae.batchtopk import BatchTopKSAE, encode_batch_topk
from saekit.sae.losses import auxk_loss, reconstruction_loss
from saekit.sae.topk import TopKSAE
from saekit.training.config import TrainConfig
from saekit.training.schedule import annealed_k

__all__ = [
    "BatchTopKObjective",
    "Code",
    "Objective",
    "StepResult",
    "SumOverProcesses",
    "TopKObjective",
    "default_k_aux",
]

SumOverProcesses = Callable[[Tensor], Tensor]

THRESHOLD_MEMORY_STEPS = (10, 100)
"""Fewest and most steps over which BatchTopK's threshold is averaged; the latter is an order more than the batch-to-batch noise of
thousands of tokens needs."""
THRESHOLD_MEMORY_FRACTION = 1 / 40
"""The same as a part of training: the entries that a batch keeps change while the weights do, so the mean may not reach back to
before the learning rate fell. Of 160 steps, a mean over 100 left an L0 of 26.6 where 32 were wanted."""


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


class Code(NamedTuple):
    """The selected entries of a batch."""

    values: Tensor
    """Activations, [N, k] or [nnz], with a graph to the encoder."""
    indices: Tensor
    """Their features, int64."""
    offsets: Tensor | None = None
    """[N + 1] where each token's entries begin; None for [N, k]."""
    pre_acts: Tensor | None = None
    """What was compared with the thresholds, where there are some."""


def default_k_aux(d_in: int) -> int:
    """Returns the power of two nearest to d_in / 2 (Gao et al. 2024, appendix A.2)."""
    return 1 << max(0, round(math.log2(d_in / 2)))


class Objective(nn.Module, ABC):
    """An SAE of normalised activations together with the terms it is trained on.

    Attributes:
        progress: part of training that is done, 0 to 1; schedules inside the loss follow it.
        has_projected_decoder: whether decoder rows are held at unit norm by constraint, so that the gradient along a row is of
            no use.
        has_normalized_decoder: whether decoder rows are held at size 1 at all, by `normalize_decoder`.
        reconstruction_weight: of the reconstruction term, 1; another where a model's loss is what is asked for.
    """

    def __init__(
        self, sae: SAE, config: TrainConfig, *, total_variance: float, sum_over_processes: SumOverProcesses
    ) -> None:
        super().__init__()
        self.sae = sae
        self.config = config
        self.total_variance = total_variance
        self.sum_over_processes = sum_over_processes
        self.has_projected_decoder = sae.has_unit_rows
        self.has_normalized_decoder = True
        self.k_aux = config.k_aux or default_k_aux(sae.d_out)
        self.progress = 0.0
        self.reconstruction_weight = 1.0
        self._residual_variance: Tensor | None = None

    @abstractmethod
    def encode(self, encoder_input: Tensor) -> Code:
        """Returns the selected entries of encoder_input [N, d_in]."""

    def forward(self, x: Tensor, dead: Tensor, coefficient: float = 0.0) -> StepResult:
        """Returns loss and figures of normalised activations x [N, d_in].

        Args:
            x: a batch, the same number of tokens on every process.
            dead: indices of the dead features [n_dead] int64, the same on every process.
            coefficient: weight of the sparsity penalty.
        """
        return self.forward_with_error(x, dead, coefficient)[0]

    def forward_with_error(self, x: Tensor, dead: Tensor, coefficient: float = 0.0) -> tuple[StepResult, Tensor]:
        """Returns what `forward` does, and target less reconstruction [N, d_out] with its graph."""
        inputs, target = split_batch(self.sae, x)
        encoder_input = self.sae.encoder_input(inputs)
        code = self.encode(encoder_input)
        reconstruction, fvu, error = self.reconstruct(inputs, target, code)
        auxiliary, weighted = self.dead_loss(encoder_input, error, dead, code)
        weight = self.reconstruction_weight
        loss = reconstruction * weight + weighted + self.penalty(encoder_input, target, code, coefficient)
        active = code.values > 0
        # Silent entries are noted at a place of their own: to leave them out would wait for the device, for their number.
        places = torch.where(active, code.indices, self.sae.d_sae).view(-1)
        fired = torch.zeros(self.sae.d_sae + 1, dtype=torch.bool, device=x.device).scatter_(0, places, True)[:-1]
        return StepResult(loss, fvu.detach(), auxiliary, active.sum(), fired), error

    def reconstruct(self, inputs: Tensor, target: Tensor, code: Code) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the reconstruction term with its graph, the FVU of all features, and target less reconstruction [N, d_out]."""
        error = target - decode(code.values, code.indices, self.sae.W_dec, self.sae.b_dec, offsets=code.offsets)
        fvu = reconstruction_loss(error, self.total_variance)
        return fvu, fvu, error

    def penalty(self, encoder_input: Tensor, target: Tensor, code: Code, coefficient: float) -> Tensor | float:
        """Returns the weighted sparsity penalty and what else belongs to it; nothing where the code is sparse by itself."""
        return 0.0

    def dead_loss(self, encoder_input: Tensor, error: Tensor, dead: Tensor, code: Code) -> tuple[Tensor, Tensor]:
        """Returns the term that brings dead features back, bare and weighted; exactly 0 when none is dead."""
        if dead.numel() == 0 or self.config.auxk_alpha == 0:
            nothing = error.new_zeros(())
            return nothing, nothing
        residual = error.detach()
        variance = self._residual_variance
        if variance is None:
            variance = _pooled_variance(_moments(residual), len(residual), self.sum_over_processes)
        W_enc, b_enc, W_dec = self.sae.W_enc.T, self.sae.b_enc, self.sae.W_dec
        weights = (W_enc.index_select(0, dead), b_enc.index_select(0, dead), W_dec.index_select(0, dead))
        loss = auxk_loss(
            encoder_input, residual, weights, k_aux=self.k_aux, residual_variance=variance.to(residual.dtype)
        )
        return loss.detach(), self.config.auxk_alpha * loss

    @torch.no_grad()
    def prepare(self, parts: Sequence[Tensor], dead: Tensor) -> None:
        """Measures over a whole batch what the loss of each of its parts needs to know.

        AuxK is measured by the residual variance of the batch, so that it has the same size however the batch is cut.

        Args:
            parts: the batch of this process in parts.
            dead: see `forward`.
        """
        self._residual_variance = None
        if len(parts) == 1 or dead.numel() == 0 or self.config.auxk_alpha == 0:
            return
        moments, count = [], 0
        for part in parts:
            inputs, target = split_batch(self.sae, part)
            _, _, error = self.reconstruct(inputs, target, self.encode(self.sae.encoder_input(inputs)))
            moments.append(_moments(error))
            count += len(error)
        self._residual_variance = _pooled_variance(torch.stack(moments).sum(0), count, self.sum_over_processes)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what the optimizer moves, by name."""
        return {"W_enc": self.sae.W_enc, "b_enc": self.sae.b_enc, "W_dec": self.sae.W_dec, "b_dec": self.sae.b_dec}

    def settle(self, *, has_unit_rows: bool = False) -> None:
        """Brings the SAE in line with the trained parameters, whose decoder rows are made unit where they are to be.

        Args:
            has_unit_rows: whether they are already, as the optimizer's own pass leaves them.
        """
        if self.has_normalized_decoder and not (has_unit_rows and self.has_projected_decoder):
            self.sae.normalize_decoder()

    def after_step(self, *, has_unit_rows: bool = False) -> None:
        """Settles, and notes what the step saw; see `settle`."""
        self.settle(has_unit_rows=has_unit_rows)

    def finish(self) -> None:
        """Turns the last weights into those that are saved, where training leaves something open."""


def _moments(error: Tensor) -> Tensor:
    """Sums over tokens of the residual [d_out] and, last, of its square norm, in float64."""
    return torch.cat([error.sum(0).double(), error.square().sum().double()[None]])


def _pooled_variance(moments: Tensor, count: int, sum_over_processes: SumOverProcesses) -> Tensor:
    # One sum for all processes, so that the loss does not depend on how the batch is split over them.
    # Filled on the device: a number that is copied there would be waited for.
    total = sum_over_processes(moments.new_full((), float(count)))
    means = sum_over_processes(moments) / total
    return means[-1] - means[:-1].square().sum()


class TopKObjective(Objective):
    """Reconstruction and AuxK."""

    sae: TopKSAE

    @property
    def k(self) -> int:
        """Features a token may use now."""
        return annealed_k(self.sae.cfg.k, self.sae.d_sae, self.progress, self.config)

    def encode(self, encoder_input: Tensor) -> Code:
        """Returns the k largest entries of each token."""
        return Code(*encode_topk(encoder_input, self.sae.W_enc, self.sae.b_enc, self.k))


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
        self._cutoff: Tensor | None = None

    @property
    def k(self) -> int:
        """Features a token uses on average now."""
        return annealed_k(self.sae.cfg.k, self.sae.d_sae, self.progress, self.config)

    def encode(self, encoder_input: Tensor) -> Code:
        """Returns the N * k largest entries of the batch, or a part's share of them after `prepare`."""
        W_enc, b_enc = self.sae.W_enc, self.sae.b_enc
        if self._cutoff is not None:
            bound = self._cutoff.expand(self.sae.d_sae)
            return Code(*encode_threshold(encoder_input, W_enc, b_enc, bound))
        code = Code(*encode_batch_topk(encoder_input, W_enc, b_enc, self.k))
        self._note_smallest(code.values)
        return code

    @torch.no_grad()
    def prepare(self, parts: Sequence[Tensor], dead: Tensor) -> None:
        """Finds, beside what every objective measures, the smallest entry that the whole batch keeps.

        What the parts keep on their own are as many entries as the batch keeps, so the smallest of them bounds the batch's from
        below, and 0 does where some part has too few. All entries above the bound then hold the batch's.
        """
        self._cutoff = None
        if len(parts) > 1:
            W_enc, b_enc = self.sae.W_enc, self.sae.b_enc
            inputs = [self.sae.encoder_input(split_batch(self.sae, part)[0]) for part in parts]
            own = [encode_batch_topk(part, W_enc, b_enc, self.k)[0].flatten() for part in inputs]
            num_kept = sum(len(part) for part in inputs) * self.k
            has_bound = sum(len(values) for values in own) == num_kept
            bound = _just_below(torch.cat(own).min()) if has_bound else own[0].new_zeros(())
            kept = torch.cat(
                [encode_threshold(part, W_enc, b_enc, bound.expand(self.sae.d_sae)).pre_acts for part in inputs]
            )
            if len(kept) > num_kept:
                kept = torch.topk(kept, num_kept, sorted=False).values
                bound = _just_below(kept.min())
            self._cutoff = bound[None]
            self._note_smallest(kept)
        super().prepare(parts, dead)

    @torch.no_grad()
    def after_step(self, *, has_unit_rows: bool = False) -> None:
        """Settles, and moves the threshold towards the smallest entry kept in this batch."""
        super().after_step(has_unit_rows=has_unit_rows)
        self.num_seen += 1
        # A plain mean at first, so that the threshold's start does not matter; then a running one that follows the weights.
        fewest, most = THRESHOLD_MEMORY_STEPS
        memory = min(most, max(fewest, THRESHOLD_MEMORY_FRACTION * self.config.num_steps))
        weight = (1.0 / self.num_seen.double()).clamp(min=1.0 / memory)
        self.sae.threshold.lerp_(self.smallest_kept.to(self.sae.threshold), weight.to(self.sae.threshold))

    def _note_smallest(self, kept: Tensor) -> None:
        own = kept.detach().double().min() if kept.numel() else kept.new_zeros((), dtype=torch.float64)
        both = self.sum_over_processes(torch.stack([own, torch.ones_like(own)]))
        self.smallest_kept.copy_(both[0] / both[1])


def _just_below(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, -torch.inf))
