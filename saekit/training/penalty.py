"""Objectives of SAEs whose sparsity comes from a penalty: JumpReLU, ReLU with L1 or Lp, and Gated."""

import math
from abc import abstractmethod

import torch
from saekit_kernels import encode_threshold
from torch import Tensor, nn

from saekit.sae.base import SAEConfig
from saekit.sae.gated import GatedSAE
from saekit.sae.jumprelu import JumpReLUSAE
from saekit.sae.losses import (
    jumprelu,
    lp_penalty,
    pre_act_loss,
    quadratic_penalty,
    reconstruction_loss,
    step_penalty,
    tanh_penalty,
)
from saekit.sae.penalized import PenalizedConfig
from saekit.sae.relu import ReLUSAE
from saekit.training.config import TrainConfig
from saekit.training.layout import Layout
from saekit.training.objective import Code, Objective
from saekit.training.partial import total
from saekit.training.sparsity import wanted_l0

__all__ = ["GatedObjective", "JumpReLUObjective", "PenalizedObjective", "ReLUObjective"]


class PenalizedObjective(Objective):
    """Reconstruction, a penalty whose weight is steered to a wanted L0, and a term for dead features."""

    sae: JumpReLUSAE | ReLUSAE | GatedSAE
    cfg: PenalizedConfig

    def wanted_l0(self, progress: float) -> float:
        """Returns the L0 to hold after a part `progress` of training."""
        assert self.cfg.target_l0 is not None
        return wanted_l0(progress, self.cfg.target_l0, self.config.sparsity)

    def total(self, value: Tensor) -> Tensor:
        """Returns the sum over all processes' features of what each one's make."""
        return total(self.layout.latents, value, "figures")

    def mean_over_features(self, values: Tensor) -> float:
        """Returns the mean of numbers that belong to this process's features [F], over those of all."""
        latents = self.layout.latents
        if latents.size == 1:
            return float(values.mean())
        return float(latents.sum(values.detach().double().sum())) / self.cfg.d_sae

    @abstractmethod
    def natural_coefficient(self) -> float:
        """Returns the size of coefficients at which the penalty is worth about what an entry is to the reconstruction."""


class JumpReLUObjective(PenalizedObjective):
    """Reconstruction, a weighted sparsity penalty and a term for dead features.

    The thresholds are trained as logarithms: they stay positive, and a step changes each by the same relative amount.
    """

    sae: JumpReLUSAE

    def __init__(
        self,
        sae: JumpReLUSAE,
        config: TrainConfig,
        *,
        total_variance: float,
        layout: Layout | None = None,
        cfg: SAEConfig | None = None,
    ) -> None:
        super().__init__(sae, config, total_variance=total_variance, layout=layout, cfg=cfg)
        self.log_threshold = nn.Parameter(sae.threshold.detach().clamp_min(1e-6).log())
        # A token with twice the wanted entries then pays the natural price for one more, beside the steered one.
        self.register_buffer("quadratic_weight", torch.tensor(self.natural_coefficient() / 4, dtype=torch.float64))
        self.quadratic_weight: Tensor

    def encode(self, encoder_input: Tensor) -> Code:
        """Returns the entries above or near their threshold, near ones with value 0."""
        cfg = self.sae.cfg
        threshold = self.log_threshold.exp()
        pre_acts, indices, offsets = encode_threshold(
            encoder_input, self.sae.W_enc, self.sae.b_enc, threshold, bandwidth=cfg.bandwidth
        )
        values = jumprelu(pre_acts, threshold[indices], cfg.bandwidth, ste_to_input=cfg.ste_to_input)
        return Code(values, indices, offsets, pre_acts)

    def penalty(self, encoder_input: Tensor, target: Tensor, code: Code, coefficient: float) -> Tensor | float:
        """Returns the weighted number or tanh of the active entries; for `quadratic` their number and its squared excess.

        The square alone would settle above the wanted L0, by as much as reconstruction pays for; a steered price beside it is
        the same square around a lower number.
        """
        cfg, num_tokens = self.sae.cfg, len(encoder_input)
        assert code.pre_acts is not None
        assert code.offsets is not None
        if cfg.sparsity == "tanh":
            norms = self.sae.W_dec.norm(dim=1)[code.indices]
            return coefficient * self.total(tanh_penalty(code.values, norms, num_tokens=num_tokens))
        at = self.log_threshold.exp()[code.indices]
        count = self.total(
            step_penalty(code.pre_acts, at, cfg.bandwidth, num_tokens=num_tokens, ste_to_input=cfg.ste_to_input)
        )
        if cfg.sparsity == "step":
            return coefficient * count
        square = quadratic_penalty(
            code.pre_acts,
            at,
            cfg.bandwidth,
            offsets=code.offsets,
            target_l0=self.wanted_l0(self.progress),
            ste_to_input=cfg.ste_to_input,
            total=self.total,
        )
        return coefficient * count + self.quadratic_weight.to(square) * square

    def natural_coefficient(self) -> float:
        """Returns what an entry at its threshold is worth to the reconstruction."""
        return self.mean_over_features(self.log_threshold.detach().mul(2).exp()) / self.total_variance

    def dead_loss(self, encoder_input: Tensor, error: Tensor, dead: Tensor, code: Code) -> tuple[Tensor, Tensor]:
        """Returns AuxK or the pre-activation loss, of the dead features or of all, bare and weighted."""
        kind = self.config.sparsity.dead_loss
        if kind == "auxk" or (kind == "pre_act" and not self._has_dead(dead)):
            return super().dead_loss(encoder_input, error, dead, code)
        assert code.pre_acts is not None
        if kind == "pre_act_all":
            dead = torch.arange(self.sae.d_sae, device=dead.device)
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
        loss = self.total(pre_act_loss(encoder_input.sum(0), weights, active, num_tokens=len(encoder_input)))
        return loss.detach(), self.config.sparsity.pre_act_coefficient * loss

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what the optimizer moves, by name; the SAE's own thresholds follow the logarithms."""
        return super().trained_parameters() | {"log_threshold": self.log_threshold}

    @torch.no_grad()
    def settle(self, *, has_unit_rows: bool = False) -> None:
        """Makes decoder rows unit and sets the SAE's thresholds to the trained ones."""
        super().settle(has_unit_rows=has_unit_rows)
        self.sae.threshold.copy_(self.log_threshold.exp())


class ReLUObjective(PenalizedObjective):
    """Reconstruction, the L1 or Lp norm of the activations, and AuxK.

    Attributes:
        penalty_ratio: scalar float64, the L1 norm of the last step's activations in multiples of their Lp norm. The penalty is
            multiplied by it, so that its size does not change while the exponent falls.
    """

    sae: ReLUSAE

    def __init__(
        self,
        sae: ReLUSAE,
        config: TrainConfig,
        *,
        total_variance: float,
        layout: Layout | None = None,
        cfg: SAEConfig | None = None,
    ) -> None:
        super().__init__(sae, config, total_variance=total_variance, layout=layout, cfg=cfg)
        self.has_projected_decoder = self.has_normalized_decoder = not sae.cfg.is_norm_weighted
        self.register_buffer("penalty_ratio", torch.ones((), dtype=torch.float64))
        self.penalty_ratio: Tensor
        self._norms = torch.zeros(2, dtype=torch.float64)

    @property
    def p(self) -> float:
        """The exponent now."""
        cfg = self.sae.cfg
        done = max(0.0, (self.progress - cfg.p_start_fraction) / (1 - cfg.p_start_fraction))
        return 1.0 - (1.0 - cfg.p_end) * done

    def encode(self, encoder_input: Tensor) -> Code:
        """Returns the positive entries."""
        nothing = self.sae.b_enc.detach().new_zeros(self.sae.d_sae)
        return Code(*encode_threshold(encoder_input, self.sae.W_enc, self.sae.b_enc, nothing))

    def penalty(self, encoder_input: Tensor, target: Tensor, code: Code, coefficient: float) -> Tensor | float:
        """Returns the weighted norm of the activations, each times its decoder row's size where the config says so."""
        acts, num_tokens = code.values, len(encoder_input)
        if self.sae.cfg.is_norm_weighted:
            acts = acts * self.sae.decoder_norms()[code.indices]
        penalty = lp_penalty(acts, p=self.p, num_tokens=num_tokens)
        if self.sae.cfg.p_end == 1.0:
            return coefficient * self.total(penalty)
        first = lp_penalty(acts.detach(), p=1.0, num_tokens=num_tokens)
        self._norms = self._norms.to(first.device) + torch.stack([first, penalty.detach()]).double() * num_tokens
        return coefficient * self.penalty_ratio.to(penalty) * self.total(penalty)

    def natural_coefficient(self) -> float:
        """Returns the reconstruction's slope in an activation of the usual size, that of L0 equal shares of the variance."""
        # What a unit of activation writes: 1, but for rows that are spread over several hook points.
        written = self.mean_over_features((self.sae.W_dec.norm(dim=1) / self.sae.decoder_norms()).detach())
        return written / math.sqrt(self.wanted_l0(0.0) * self.total_variance)

    def after_step(self, *, has_unit_rows: bool = False) -> None:
        """Settles, and measures the penalty."""
        super().after_step(has_unit_rows=has_unit_rows)
        if self.sae.cfg.p_end < 1.0:
            first, current = self.layout.everyone.sum(self._norms.to(self.sae.b_dec.device)).tolist()
            if current > 0:
                self.penalty_ratio.fill_(first / current)
            self._norms = torch.zeros_like(self._norms)

    def finish(self) -> None:
        """Moves the norms of free decoder rows into the encoder."""
        self.sae.absorb_decoder_norms()


class GatedObjective(PenalizedObjective):
    """Reconstruction, the L1 norm of the open gates, the gates' own reconstruction by a frozen decoder, and AuxK.

    The step of a gate has no gradient: its directions and bias are trained by the last two terms.

    Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders", equation 8.
    """

    sae: GatedSAE

    def encode(self, encoder_input: Tensor) -> Code:
        """Returns the magnitudes of the open gates, and the gates as pre-activations."""
        sae, bias = self.sae, self.sae.b_enc.detach()
        closed = bias.new_zeros(sae.d_sae)
        gates, indices, offsets = encode_threshold(encoder_input, sae.W_enc, bias, closed)
        magnitudes = sae.magnitudes(gates - bias[indices], indices)
        # The value is that of the gate; its bias gets the gradient that a gate cannot pass through the magnitudes.
        return Code(magnitudes, indices, offsets, gates + (sae.b_enc - bias)[indices])

    def penalty(self, encoder_input: Tensor, target: Tensor, code: Code, coefficient: float) -> Tensor | float:
        """Returns the weighted L1 norm of the gates, and how badly they reconstruct with today's decoder as a constant."""
        gates = code.pre_acts
        assert gates is not None
        frozen = self.decode(gates, code, self.sae.W_dec.detach(), self.sae.b_dec.detach())
        auxiliary = reconstruction_loss(target - frozen, self.total_variance)
        return auxiliary + coefficient * self.total(lp_penalty(gates, p=1.0, num_tokens=len(encoder_input)))

    def natural_coefficient(self) -> float:
        """Returns the reconstruction's slope in an activation of the usual size, that of L0 equal shares of the variance."""
        return 1.0 / math.sqrt(self.wanted_l0(0.0) * self.total_variance)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what the optimizer moves, by name."""
        return super().trained_parameters() | {"r_mag": self.sae.r_mag, "b_mag": self.sae.b_mag}
