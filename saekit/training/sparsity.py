"""Steering an SAE to the L0 that was asked for."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from saekit.sae.base import SAEConfig
from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.gated import GatedSAE
from saekit.sae.jumprelu import JumpReLUSAE
from saekit.sae.relu import ReLUSAE
from saekit.training.axis import Axis, float_of
from saekit.training.config import SparsityConfig
from saekit.training.layout import Layout

__all__ = [
    "L0Control",
    "calibration_factor",
    "calibration_shift",
    "init_shared_threshold",
    "init_thresholds",
    "wanted_l0",
]

MAX_LOG_STEP = 0.1
"""Most the coefficient's logarithm moves in a step, so that one strange batch cannot throw it off."""
FEATURES_AT_A_TIME = 512


def wanted_l0(progress: float, target_l0: float, config: SparsityConfig) -> float:
    """Returns the L0 to hold after a part `progress` of training (0 to 1): geometric from the start to the target, then flat."""
    left = max(0.0, 1.0 - progress / config.ramp_fraction)
    factor: float = config.start_factor**left
    return target_l0 * factor


class L0Control:
    """Proportional and integral control of the sparsity coefficient's logarithm.

    In the logarithm, because useful coefficients span decades and the same relative error of L0 then asks for the same
    relative change whatever the model, the width and the target.
    """

    def __init__(self, config: SparsityConfig, *, start: float) -> None:
        self.config = config
        self.log_coefficient = math.log(start)
        self.error = 0.0

    @property
    def coefficient(self) -> float:
        """The weight of the penalty in the next step."""
        return math.exp(self.log_coefficient + self.config.proportional_gain * self.error)

    def update(self, l0: float, wanted: float) -> None:
        """Notes the L0 of a step and what was wanted; an L0 too high raises the coefficient."""
        self.error = max(-2.0, min(2.0, math.log(max(l0, 1e-3) / wanted)))
        step = self.config.integral_gain * self.error
        self.log_coefficient += max(-MAX_LOG_STEP, min(MAX_LOG_STEP, step))

    def state_dict(self) -> dict[str, float]:
        """Returns the exact state."""
        return {"log_coefficient": self.log_coefficient, "error": self.error}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` returned."""
        self.log_coefficient, self.error = state["log_coefficient"], state["error"]


@torch.no_grad()
def init_thresholds(sae: JumpReLUSAE | ReLUSAE | GatedSAE, x: Tensor, density: float) -> None:
    """Sets each threshold to the quantile of the feature's pre-activations on x [N, d_in] at which it fires on a part of them.

    Where pre-activations are compared with 0, their bias does what a threshold would do.

    All features then start equally active and the selected entries are few from the first step; a common small start value
    would make half of all entries active and leave Adam's bounded steps thousands of steps from the target.
    """
    keep = max(1, min(len(x) - 1, round(len(x) * density)))
    encoder_input = sae.encoder_input(x)
    for start in range(0, sae.d_sae, FEATURES_AT_A_TIME):
        rows = slice(start, start + FEATURES_AT_A_TIME)
        z = encoder_input @ sae.W_enc[:, rows] + sae.b_enc[rows]
        quantiles = z.kthvalue(len(x) - keep, dim=0).values
        if isinstance(sae, JumpReLUSAE):
            sae.threshold[rows] = quantiles.clamp_min(1e-3)
        else:
            sae.b_enc[rows] -= quantiles


@torch.no_grad()
def init_shared_threshold(sae: BatchTopKSAE, x: Tensor, layout: Layout, cfg: SAEConfig) -> None:
    """Sets the one threshold to the value that k entries a token of x [N, d_in] exceed on average.

    A quantile of 2^24 entries at most, of tokens spread over `x`; training replaces it by what its batches keep.

    Args:
        sae: or this process's part of it.
        x: the same on every process.
        layout: which processes hold the other features.
        cfg: of the whole SAE.
    """
    step = max(1, len(x) * cfg.d_sae // 2**24)
    pre_acts = sae.pre_acts(x[::step])
    keep = min(sae.cfg.k * len(pre_acts), len(pre_acts) * cfg.d_sae - 1)
    # The k-th largest from above is the one that k exceed where it is not counted itself.
    sae.threshold.fill_(float_of(layout.latents.kth_largest(pre_acts.clamp_min(0), keep + 1, "start")).item())


@torch.no_grad()
def calibration_factor(
    sae: JumpReLUSAE, batches: Iterable[Tensor], target_l0: float, *, latents: Axis | None = None, reach: float = 1.25
) -> float:
    """Returns the one factor on all thresholds at which the mean L0 over the batches is the target, within [1/reach, reach].

    Exact, no search: an entry is active exactly while the factor is below z / threshold, so the factor is an order
    statistic of those ratios.
    """
    ratios, num_tokens = [], 0
    for x in batches:
        ratio = (sae.pre_acts(x) / sae.threshold).flatten()
        ratios.append(ratio[ratio > 1 / reach])
        num_tokens += len(x)
    found = _everyones(ratios, latents)
    keep = round(target_l0 * num_tokens)
    if keep < 1 or keep >= len(found):
        return 1 / reach if keep >= len(found) else reach
    value = float(found.kthvalue(len(found) - keep).values)
    return min(max(value, 1 / reach), reach)


@torch.no_grad()
def calibration_shift(
    sae: ReLUSAE | GatedSAE,
    batches: Iterable[Tensor],
    target_l0: float,
    *,
    latents: Axis | None = None,
    reach: float = 0.25,
) -> float:
    """Returns what to add to every b_enc for a mean L0 over the batches of the target, at most `reach` of the mean active entry.

    Exact, no search: an entry is active exactly while the shift is above its pre-activation's opposite. Features whose
    magnitude is 0 stay silent whatever their gate does.
    """
    kept, limit, num_tokens = [], None, 0
    for x in batches:
        z = sae.pre_acts(x)
        if isinstance(sae, GatedSAE):
            z = z[(sae.r_mag.exp() * (z - sae.b_enc) + sae.b_mag) > 0]
        if limit is None:
            limit = reach * _mean_positive(z, latents)
        kept.append(z[z > -limit])
        num_tokens += len(x)
    assert limit is not None, "calibration without tokens"
    found = _everyones(kept, latents)
    keep = round(target_l0 * num_tokens)
    if keep < 1 or keep >= len(found):
        return limit if keep >= len(found) else -limit
    return min(max(-float(found.kthvalue(len(found) - keep).values), -limit), limit)


def _everyones(found: list[Tensor], latents: Axis | None) -> Tensor:
    """Returns numbers of all features, of those of this process's."""
    own = torch.cat(found)
    return own if latents is None else torch.cat(list(latents.gather_rows(own, "finish")))


def _mean_positive(z: Tensor, latents: Axis | None) -> float:
    """Returns the mean of the positive numbers of all features, 0 where there are none."""
    positive = z[z > 0]
    if latents is None or latents.size == 1:
        return float(positive.mean()) if len(positive) else 0.0
    total, count = latents.sum(positive.new_tensor([positive.double().sum(), len(positive)]), "finish").tolist()
    return total / count if count else 0.0
