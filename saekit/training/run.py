"""One training run in memory: what changes from step to step, a step, and its exact state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations.source import ActivationSource
from saekit.errors import NonFiniteError
from saekit.sae.base import SAE
from saekit.sae.batch import num_samples
from saekit.sae.crosscoder import Crosscoder
from saekit.sae.fold import AnyNormalization, normalization_state
from saekit.training.average import WeightAverage
from saekit.training.build import build_objective
from saekit.training.config import TrainConfig
from saekit.training.dead import DeadFeatures, default_dead_after
from saekit.training.fused_adam import FusedAdam
from saekit.training.micro import backward_in_parts
from saekit.training.objective import StepResult
from saekit.training.optim import GradientClip, build_optimizer, project_decoder_gradient, set_learning_rates
from saekit.training.penalty import PenalizedObjective
from saekit.training.resample import is_due, resample_features
from saekit.training.schedule import default_lr, lr_factor
from saekit.training.schedule_free import ScheduleFreeSignum
from saekit.training.sparsity import L0Control
from saekit.training.timing import StepTimer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Gradients", "StepFigures", "TrainRun"]


class Gradients(NamedTuple):
    """What a process found out while it added up the gradients of its share of a batch."""

    result: StepResult
    """Loss and figures, without graph."""
    raw: Tensor
    """The activations that the SAE read [n, d_in]."""
    terms: Mapping[str, Tensor]
    """Further terms of the loss, scalars."""


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

    Nothing here assumes a single process: a process sees its share of each batch, and figures, gradients and counters are
    reduced over all of them, so that every process holds the same state.
    """

    def __init__(
        self,
        sae: SAE,
        source: ActivationSource,
        config: TrainConfig,
        *,
        normalization: AnyNormalization,
        accelerator: "Accelerator",
    ) -> None:
        """Takes an SAE of normalised activations, and trains it in place."""
        self.config = config
        self.source = source
        self.normalization = normalization
        self.accelerator = accelerator
        self.sae = sae.to(accelerator.device)
        self.objective = build_objective(
            self.sae, config, total_variance=normalization.total_variance, sum_over_processes=self._sum
        ).to(accelerator.device)
        self.parameters = self.objective.trained_parameters()
        self.peak_lr = config.lr if config.lr is not None else default_lr(sae.d_sae, config.num_steps, config.optimizer)
        self.optimizer = build_optimizer(
            self.parameters,
            config,
            lr=self.peak_lr,
            has_unit_rows=self.objective.has_projected_decoder,
            num_sites=sae.num_sites if isinstance(sae, Crosscoder) and self.objective.has_normalized_decoder else None,
        )
        self.average = WeightAverage(self.objective, self.optimizer, decay=config.ema_decay)
        self.clip = GradientClip(config.clip_factor)
        self.dead = DeadFeatures(sae.d_sae, default_dead_after(config), accelerator.device)
        self.control = self._build_control()
        self.timer = StepTimer(accelerator.device)
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
            NonFiniteError: the batch, the loss or a gradient has NaN or Inf; the weights are as before the step.
        """
        self.timer.begin()
        factor = lr_factor(self.step, self.config)
        set_learning_rates(self.optimizer, factor)
        coefficient = self.control.coefficient if self.control else 0.0
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.progress = self.step / self.config.num_steps
        result, raw, terms = self.add_gradients(self.dead.indices, coefficient)
        self.timer.mark("compute")
        self._average_gradients()
        self.timer.mark("reduce")
        norm = self._gradient_norm()

        means = torch.stack([result.loss, result.fvu, result.auxiliary, *terms.values()]).double()
        counts = [means.new_full((1,), float(count)) for count in (len(raw), stop_asked)]
        own = torch.cat([*counts, result.num_active.double()[None], means])
        summed = self._sum(torch.cat([own, result.fired.double()]))
        silent_tokens, num_dead = self.dead.after(summed[len(own) :] > 0, self.config.batch_size)
        # One transfer for all figures of the step, and the only time that it waits for the device.
        told = torch.cat([norm.double()[None], num_dead.double()[None], summed[: len(own)]]).tolist()
        gradient_norm, dead_count, num_tokens, stops, num_active = told[:5]
        loss, fvu, auxiliary, *others = (value / self.accelerator.num_processes for value in told[5:])
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise self._non_finite(raw)

        if isinstance(self.optimizer, FusedAdam):
            self.optimizer.gradient_scale = self.clip.scale(gradient_norm)
        self.clip.update(gradient_norm)
        self.optimizer.step()
        self.objective.after_step(has_unit_rows=isinstance(self.optimizer, FusedAdam | ScheduleFreeSignum))
        self.average.update()
        self.dead.take(silent_tokens, int(dead_count))
        self.step += 1
        l0 = num_active / (num_tokens * num_samples(self.sae))
        if self.control:
            self.control.update(l0, self._wanted_l0())
        dead_fraction = self.dead.num_dead / self.sae.d_sae
        resampled = resample_features(self) if is_due(self.config, self.step) else 0
        self.timer.mark("update")
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
        raw = self.source.next_batch().to(self.accelerator.device, non_blocking=True)
        self.timer.mark("read")
        x = self.normalization.apply(raw)
        result = backward_in_parts(self.objective, x, dead, coefficient, part_tokens=self.config.micro_batch_size)
        return Gradients(result, raw, {})

    def state_dict(self) -> dict[str, object]:
        """Returns what is the same on every process, exactly."""
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
        self.average.load_state_dict(state["average"])
        if self.control:
            self.control.load_state_dict(state["control"])

    def _sum(self, value: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(value, reduction="sum")
        return total

    def _gradient_norm(self) -> Tensor:
        """Returns the norm of the projected gradient before clipping; what does not clip by itself is clipped here."""
        if isinstance(self.optimizer, FusedAdam):
            return self.optimizer.gradient_norm()
        if self.objective.has_projected_decoder:
            project_decoder_gradient(self.sae.W_dec)
        return self.clip.apply(self.parameters)

    def _average_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            # W_enc is a transposed view; collectives want memory in order.
            gradient = parameter.grad.T if name == "W_enc" else parameter.grad
            gradient.copy_(self._sum(gradient) / self.accelerator.num_processes)

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
