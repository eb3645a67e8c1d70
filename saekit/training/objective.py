"""One step's loss of an SAE in normalised activations, computed from the selected entries alone."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from saekit_kernels import decode, encode_threshold
from torch import Tensor, nn

from saekit.sae.base import SAE, SAEConfig
from saekit.sae.batch import split_batch
from saekit.sae.batchtopk import BatchTopKSAE, encode_batch_topk
from saekit.sae.losses import auxk_loss, reconstruction_loss
from saekit.sae.topk import KConfig, TopKSAE
from saekit.training.config import TrainConfig
from saekit.training.layout import Layout
from saekit.training.partial import shared, total
from saekit.training.schedule import annealed_k
from saekit.training.selection import auxk_over, batch_cutoff, batch_topk_over, topk_over

__all__ = [
    "BatchTopKObjective",
    "Code",
    "Objective",
    "StepResult",
    "TopKObjective",
    "default_k_aux",
]

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
    """Active entries in the batch, a scalar; of this process's features."""
    fired: Tensor
    """Which of this process's features were active on any token [F] bool."""


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

    The SAE may be a part of one whose other features are with other processes: each of them computes the whole loss, in which
    their reconstructions and penalties are summed, and the gradients of its own features.

    Attributes:
        cfg: of the whole SAE.
        layout: which processes hold other tokens or other features.
        num_dead: dead features of all processes, where there are other ones than this.
        progress: part of training that is done, 0 to 1; schedules inside the loss follow it.
        has_projected_decoder: whether decoder rows are held at unit norm by constraint, so that the gradient along a row is of
            no use.
        has_normalized_decoder: whether decoder rows are held at size 1 at all, by `normalize_decoder`.
        reconstruction_weight: of the reconstruction term, 1; another where a model's loss is what is asked for.
    """

    def __init__(
        self,
        sae: SAE,
        config: TrainConfig,
        *,
        total_variance: float,
        layout: Layout | None = None,
        cfg: SAEConfig | None = None,
    ) -> None:
        """Takes the SAE or this process's part of it; a layout of None is one process, a config of None the SAE's own."""
        super().__init__()
        self.sae = sae
        self.cfg = cfg if cfg is not None else sae.cfg
        self.config = config
        self.total_variance = total_variance
        self.layout = layout if layout is not None else Layout.alone(sae.b_dec.device)
        self.num_dead = 0
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
        encoder_input = self.encoder_input(inputs)
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
        error = target - self.decode(code.values, code, self.sae.W_dec, self.sae.b_dec)
        fvu = reconstruction_loss(error, self.total_variance)
        return fvu, fvu, error

    def encoder_input(self, inputs: Tensor) -> Tensor:
        """Returns what the encoder multiplies; all processes' features together take the gradient of what is subtracted."""
        if not self.layout.is_sharded or not self.cfg.apply_b_dec_to_input:
            return self.sae.encoder_input(inputs)
        return inputs.to(self.sae.W_enc.dtype) - shared(self.layout.latents, self.sae.b_dec)

    def decode(self, values: Tensor, code: Code, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
        """Returns what values at the places of a code reconstruct, summed over all processes' features."""
        if not self.layout.is_sharded:
            return decode(values, code.indices, W_dec, b_dec, offsets=code.offsets)
        x_hat = total(self.layout.latents, decode(values, code.indices, W_dec, offsets=code.offsets))
        return x_hat if b_dec is None else x_hat + b_dec

    def penalty(self, encoder_input: Tensor, target: Tensor, code: Code, coefficient: float) -> Tensor | float:
        """Returns the weighted sparsity penalty and what else belongs to it; nothing where the code is sparse by itself."""
        return 0.0

    def dead_loss(self, encoder_input: Tensor, error: Tensor, dead: Tensor, code: Code) -> tuple[Tensor, Tensor]:
        """Returns the term that brings dead features back, bare and weighted; exactly 0 when none is dead."""
        if not self._has_dead(dead) or self.config.auxk_alpha == 0:
            nothing = error.new_zeros(())
            return nothing, nothing
        residual = error.detach()
        variance = self._residual_variance
        if variance is None:
            variance = self._pooled_variance(_moments(residual), len(residual))
        W_enc, b_enc, W_dec = self.sae.W_enc.T, self.sae.b_enc, self.sae.W_dec
        weights = (W_enc.index_select(0, dead), b_enc.index_select(0, dead), W_dec.index_select(0, dead))
        loss = auxk_loss(
            encoder_input,
            residual,
            weights,
            k_aux=self.k_aux,
            residual_variance=variance.to(residual.dtype),
            explain=partial(auxk_over, self.layout.latents, num_features=max(self.num_dead, len(dead))),
        )
        return loss.detach(), self.config.auxk_alpha * loss

    def _has_dead(self, dead: Tensor) -> bool:
        """Whether a feature is dead, here or where other processes hold the features."""
        return self.num_dead > 0 if self.layout.is_sharded else dead.numel() > 0

    def _pooled_variance(self, moments: Tensor, count: int) -> Tensor:
        # One sum for all processes, so that the loss does not depend on how the batch is split over them.
        # Filled on the device: a number that is copied there would be waited for.
        data = self.layout.data
        means = data.sum(moments) / data.sum(moments.new_full((), float(count)))
        return means[-1] - means[:-1].square().sum()

    @torch.no_grad()
    def prepare(self, parts: Sequence[Tensor], dead: Tensor) -> None:
        """Measures over a whole batch what the loss of each of its parts needs to know.

        AuxK is measured by the residual variance of the batch, so that it has the same size however the batch is cut.

        Args:
            parts: the batch of this process in parts.
            dead: see `forward`.
        """
        self._residual_variance = None
        if not self._is_cut(parts) or not self._has_dead(dead) or self.config.auxk_alpha == 0:
            return
        moments, count = [], 0
        for part in parts:
            inputs, target = split_batch(self.sae, part)
            _, _, error = self.reconstruct(inputs, target, self.encode(self.encoder_input(inputs)))
            moments.append(_moments(error))
            count += len(error)
        self._residual_variance = self._pooled_variance(torch.stack(moments).sum(0), count)

    def _is_cut(self, parts: Sequence[Tensor]) -> bool:
        """Whether a batch comes in parts, on any process: of a short batch some may have a single part, and have to join in."""
        return len(parts) > 1 or (self.layout.num_processes > 1 and self.config.micro_batch_size is not None)

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


class TopKObjective(Objective):
    """Reconstruction and AuxK."""

    sae: TopKSAE
    cfg: KConfig

    @property
    def k(self) -> int:
        """Features a token may use now."""
        return annealed_k(self.cfg.k, self.cfg.d_sae, self.progress, self.config)

    def encode(self, encoder_input: Tensor) -> Code:
        """Returns those of the k largest entries of each token that this process holds."""
        return Code(*topk_over(self.layout.latents, encoder_input, self.sae.W_enc, self.sae.b_enc, self.k))


class BatchTopKObjective(Objective):
    """Reconstruction and AuxK; the inference threshold follows the smallest entry that a batch keeps.

    A batch is that of all processes: which entries it keeps does not depend on how it is shared.
    """

    sae: BatchTopKSAE
    cfg: KConfig

    def __init__(
        self,
        sae: BatchTopKSAE,
        config: TrainConfig,
        *,
        total_variance: float,
        layout: Layout | None = None,
        cfg: SAEConfig | None = None,
    ) -> None:
        super().__init__(sae, config, total_variance=total_variance, layout=layout, cfg=cfg)
        self.register_buffer("smallest_kept", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("num_seen", torch.zeros(1, dtype=torch.int64))
        self.smallest_kept: Tensor
        self.num_seen: Tensor
        self._cutoff: Tensor | None = None

    @property
    def k(self) -> int:
        """Features a token uses on average now."""
        return annealed_k(self.cfg.k, self.cfg.d_sae, self.progress, self.config)

    def encode(self, encoder_input: Tensor) -> Code:
        """Returns the N * k largest entries of the batch, or a part's share of them after `prepare`."""
        W_enc, b_enc = self.sae.W_enc, self.sae.b_enc
        if self._cutoff is not None:
            bound = self._cutoff.expand(self.sae.d_sae)
            return Code(*encode_threshold(encoder_input, W_enc, b_enc, bound))
        everyone = self.layout.everyone
        if everyone.size == 1:
            code = Code(*encode_batch_topk(encoder_input, W_enc, b_enc, self.k))
        else:
            place = self.layout.data.rank, self.layout.features(self.cfg.d_sae).start
            num_wanted = self._num_wanted(len(encoder_input))
            code = Code(*batch_topk_over(everyone, encoder_input, W_enc, b_enc, num_wanted, place=place))
        self._note_smallest(code.values)
        return code

    @torch.no_grad()
    def prepare(self, parts: Sequence[Tensor], dead: Tensor) -> None:
        """Finds, beside what every objective measures, what the entries that the whole batch keeps exceed."""
        self._cutoff = None
        if self._is_cut(parts):
            inputs = [self.encoder_input(split_batch(self.sae, part)[0]) for part in parts]
            num_wanted = self._num_wanted(sum(len(part) for part in inputs))
            everyone, W_enc, b_enc = self.layout.everyone, self.sae.W_enc, self.sae.b_enc
            self._cutoff, kept = batch_cutoff(everyone, inputs, W_enc, b_enc, num_wanted)
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

    def _num_wanted(self, num_tokens: int) -> int:
        """Returns how many entries a batch keeps of which this process has some tokens."""
        own = torch.tensor(num_tokens, device=self.sae.b_dec.device)
        return self.k * int(self.layout.data.sum(own))

    def _note_smallest(self, kept: Tensor) -> None:
        nothing = kept.new_full((), torch.inf, dtype=torch.float64)
        least = self.layout.everyone.least(kept.detach().double().min() if kept.numel() else nothing)
        self.smallest_kept.copy_(torch.where(least < torch.inf, least, 0.0))
