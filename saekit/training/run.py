"""One training run in memory: what changes from step to step, a step, and its exact state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations.source import ActivationSource
from saekit.errors import NonFiniteError
from saekit.sae.base import SAE, SAEConfig
from saekit.sae.batch import num_samples
from saekit.sae.crosscoder import Crosscoder
from saekit.sae.fold import AnyNormalization, normalization_state
from saekit.training.average import WeightAverage
from saekit.training.build import build_objective
from saekit.training.config import TrainConfig
from saekit.training.dead import DeadFeatures, default_dead_after
from saekit.training.fused_adam import FusedAdam
from saekit.training.hostcopy import HostCopy
from saekit.training.layout import Layout
from saekit.training.micro import backward_in_parts
from saekit.training.objective import StepResult
from saekit.training.optim import GradientClip, build_optimizer, project_decoder_gradient, set_learning_rates
from saekit.training.penalty import PenalizedObjective
from saekit.training.reducer import GradientReducer
from saekit.training.resample import is_due, resample_features
from saekit.training.schedule import default_lr, lr_factor
from saekit.training.schedule_free import ScheduleFreeSignum
from saekit.training.sparsity import L0Control
from saekit.training.timing import StepTimer

__all__ = ["Gradients", "StepFigures", "TrainRun"]


class Gradients(NamedTuple):
    """What a process found out while it added up the gradients of its share of a batch.

    Figures and gradients of the batch are the means over the data axis by weight.
    """

    result: StepResult
    """Loss and figures, without graph."""
    raw: Tensor
    """The activations that the SAE read [n, d_in]."""
    terms: Mapping[str, Tensor]
    """Further terms of the loss, scalars."""
    weight: float = 1.0
    """Of this process: its tokens over its even share of a whole batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """Figures of one step over all processes."""

    loss: float
    fvu: float
    auxiliary: float
    l0: float
    dead_fraction: float
    lr: float
    coefficient: float
    gradient_norm: float
    resampled: int
    """Features that were drawn anew after the step."""
    terms: Mapping[str, float]
    """The loss's own terms where it has more than these, before weighting."""
    stop_asked: bool


class TrainRun:
    """Weights, optimizer, counters and data position of a training that goes on step by step.

    Nothing here assumes a single process: a process sees the share of each batch, and holds the features, that the layout gives
    it; figures, gradients and counters are reduced over all of them.
    """

    def __init__(
        self,
        sae: SAE,
        source: ActivationSource,
        config: TrainConfig,
        *,
        normalization: AnyNormalization,
        layout: Layout | None = None,
        cfg: SAEConfig | None = None,
    ) -> None:
        """Takes an SAE of normalised activations, or this process's part of it, and trains it in place.

        Args:
            sae: with weights.
            source: of this process's tokens.
            config: how to train.
            normalization: of the activations.
            layout: who holds other tokens and features; None = nobody.
            cfg: of the whole SAE; None = that of `sae`.
        """
        self.config = config
        self.cfg = cfg if cfg is not None else sae.cfg
        self.layout = layout if layout is not None else Layout.alone(sae.b_dec.device)
        self.source = source
        self.normalization = normalization
        self.sae = sae.to(self.layout.device)
        self.objective = build_objective(
            self.sae, config, total_variance=normalization.total_variance, layout=self.layout, cfg=self.cfg
        ).to(self.layout.device)
        self.parameters = self.objective.trained_parameters()
        self.peak_lr = (
            config.lr if config.lr is not None else default_lr(self.cfg.d_sae, config.num_steps, config.optimizer)
        )
        self.optimizer = build_optimizer(
            self.parameters,
            config,
            lr=self.peak_lr,
            has_unit_rows=self.objective.has_projected_decoder,
            num_sites=sae.num_sites if isinstance(sae, Crosscoder) and self.objective.has_normalized_decoder else None,
        )
        self.average = WeightAverage(self.objective, self.optimizer, decay=config.ema_decay)
        self.clip = GradientClip(config.clip_factor)
        self.dead = DeadFeatures(sae.d_sae, default_dead_after(config), self.layout.device)
        self.reducer = GradientReducer(self.parameters, self.layout.data)
        self.control = self._build_control()
        self.timer = StepTimer(self.layout.device)
        self.step = 0

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all processes."""
        return self.step * self.config.batch_size

    def train_step(self, *, stop_asked: bool = False) -> StepFigures:
        """Reads a batch and moves the weights by one step.

        Args:
            stop_asked: whether this process was asked to stop; told to all of them.

        Raises:
            NonFiniteError: the batch, the loss or a gradient has NaN or Inf; the weights in memory are lost with it.
        """
        self.timer.begin()
        factor = lr_factor(self.step, self.config)
        set_learning_rates(self.optimizer, factor)
        coefficient = self.control.coefficient if self.control else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.progress = self.step / self.config.num_steps
        result, raw, terms, weight = self.add_gradients(self.dead.indices, coefficient)
        self.timer.mark("compute")
        weights = self.reducer.finish()
        self.timer.mark("reduce")
        norm = self._gradient_norm()

        means = torch.stack([result.loss, result.fvu, result.auxiliary, *terms.values()]).double() * weight
        counts = [means.new_full((1,), float(count)) for count in (len(raw), stop_asked)]
        data, latents = self.layout.data, self.layout.latents
        summed = data.sum(torch.cat([*counts, result.num_active.double()[None], means]))
        silent_tokens, own_dead = self.dead.after(data.any(result.fired), self.config.batch_size)
        # Active entries and dead features are those of this process's features; whoever was asked to stop stops all.
        by_latents = latents.sum(torch.stack([summed[2], own_dead.double(), summed[1]]))
        # One transfer for all figures of the step, which goes on beside the update.
        told = HostCopy(torch.cat([norm.double()[None], own_dead.double()[None], weights[None], by_latents, summed]))
        if isinstance(self.optimizer, FusedAdam):
            self.optimizer.gradient_scale = self.clip.scale(norm)
        self.optimizer.step()
        self.objective.after_step(has_unit_rows=isinstance(self.optimizer, FusedAdam | ScheduleFreeSignum))
        self.average.update()
        self.timer.mark("update")
        # Waits for the gradients and not for the update: while the device is busy with that, the next step is begun.
        gradient_norm, own_count, total_weight, num_active, num_dead, stops, num_tokens, *sums = told.read()
        loss, fvu, auxiliary, *others = (value / total_weight for value in sums[2:])
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise self._non_finite(raw)
        self.clip.update(gradient_norm)
        self.dead.take(silent_tokens, int(own_count))
        self.objective.num_dead = int(num_dead)
        self.step += 1
        l0 = num_active / (num_tokens * num_samples(self.sae))
        if self.control:
            self.control.update(l0, self._wanted_l0())
        dead_fraction = num_dead / self.cfg.d_sae
        resampled = resample_features(self) if is_due(self.config, self.step) else 0
        return StepFigures(
            loss=loss,
            fvu=fvu,
            auxiliary=auxiliary,
            l0=l0,
            dead_fraction=dead_fraction,
            lr=self.peak_lr * factor,
            coefficient=coefficient,
            gradient_norm=gradient_norm,
            resampled=resampled,
            terms=dict(zip(terms, others, strict=True)),
            stop_asked=stops > 0,
        )

    def add_gradients(self, dead: Tensor, coefficient: float) -> Gradients:
        """Reads a batch and adds this process's gradients to the parameters; the mean over processes is the batch's.

        Args:
            dead: indices of the dead features.
            coefficient: weight of the sparsity penalty.
        """
        raw = self.source.next_batch().to(self.layout.device, non_blocking=True)
        self.timer.mark("read")
        x = self.normalization.apply(raw)
        # A short batch at the end of the data counts as much as it has tokens, wherever it is short.
        weight = len(raw) * self.layout.data.size / self.config.batch_size if self.layout.data.size > 1 else 1.0
        result = backward_in_parts(
            self.objective,
            x,
            dead,
            coefficient,
            part_tokens=self.config.micro_batch_size,
            weight=weight,
            before_last=partial(self.reducer.arm, weight),
        )
        return Gradients(result, raw, {}, weight)

    def state_dict(self) -> dict[str, object]:
        """Returns the exact state, the same on every process that holds the same features."""
        return {
            "step": self.step,
            "normalization": normalization_state(self.normalization),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gradient_norm": self.clip.mean,
            "silent_tokens": self.dead.silent_tokens,
            "average": self.average.state_dict(),
            "control": self.control.state_dict() if self.control else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self.step = state["step"]
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clip.mean = state["gradient_norm"]
        self.dead.take(state["silent_tokens"])
        self._count_dead()
        self.average.load_state_dict(state["average"])
        if self.control:
            self.control.load_state_dict(state["control"])

    def _count_dead(self) -> None:
        own = torch.tensor(self.dead.num_dead, device=self.layout.device)
        self.objective.num_dead = int(self.layout.latents.sum(own))

    def _gradient_norm(self) -> Tensor:
        """Returns the norm of the projected gradient before clipping; what does not clip by itself is clipped here."""
        if isinstance(self.optimizer, FusedAdam):
            return self.optimizer.gradient_norm(self.layout.latents)
        if self.objective.has_projected_decoder:
            project_decoder_gradient(self.sae.W_dec)
        return self.clip.apply(self.parameters, self.layout.latents)

    def _build_control(self) -> L0Control | None:
        if not isinstance(self.objective, PenalizedObjective):
            return None
        return L0Control(self.config.sparsity, start=self.objective.natural_coefficient())

    def _wanted_l0(self) -> float:
        assert isinstance(self.objective, PenalizedObjective)
        return self.objective.wanted_l0(self.step / self.config.num_steps)

    def _non_finite(self, raw: Tensor) -> NonFiniteError:
        bad = (~torch.isfinite(raw)).any(dim=1)
        if bool(bad.any()):
            return NonFiniteError(
                f"training step {self.step + 1}: {int(bad.sum())} of {len(bad)} activations in the batch have NaN or Inf, "
                f"needs finite ones; verify the activation cache"
            )
        return NonFiniteError(
            f"training step {self.step + 1}: the loss is not finite, needs a smaller step; "
            f"lower lr (now {self.peak_lr:.3g}) and train into a new folder"
        )
