"""The learning rate over training: a short warm-up, a plateau, a linear fall to zero."""

import math

from saekit.training.config import TrainConfig

__all__ = ["default_lr", "lr_factor"]

MAX_WARMUP_STEPS = 1000


def default_lr(d_sae: int, num_steps: int) -> float:
    """Returns 2e-4 * sqrt(2^14 / d_sae), times sqrt(36,000 / steps) between 1 and 6 for short trainings.

    The first factor is what long trainings use. A short one ends before so small a rate gets anywhere: with 1,000 steps of
    1,024 tokens (d_in 576, d_sae 4,608) the rate itself left an FVU of 0.33, six times as much 0.20, ten times as much 0.20
    with an eighth of the features dead.

    Source: Gao et al. 2024, appendix A.3 (the exponent); 2e-4 at 2^14 features is the value of the common trainers.
    """
    return 2e-4 * math.sqrt(2**14 / d_sae) * min(6.0, max(1.0, math.sqrt(36_000 / num_steps)))


def lr_factor(step: int, config: TrainConfig) -> float:
    """Returns what the peak learning rate is multiplied by in step `step` (0 is the first); above 0 in every step."""
    num_steps = config.num_steps
    warmup = min(MAX_WARMUP_STEPS, round(num_steps * config.warmup_fraction))
    decay = round(num_steps * config.decay_fraction)
    rising = (step + 1) / (warmup + 1) if step < warmup else 1.0
    falling = (num_steps - step) / decay if decay and step > num_steps - decay else 1.0
    return min(rising, falling)
