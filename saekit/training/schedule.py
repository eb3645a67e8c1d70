"""The learning rate over training: a short warm-up, a plateau, a linear fall to zero."""

import math

from saekit.training.config import TrainConfig

__all__ = ["annealed_k", "default_lr", "lr_factor"]

MAX_WARMUP_STEPS = 1000


def default_lr(d_sae: int, num_steps: int, optimizer: str = "adam") -> float:
    """Returns 2e-4 * sqrt(2^14 / d_sae), times sqrt(36,000 / steps) between 1 and 6 for short trainings.

    The first factor is what long trainings use. A short one ends before so small a rate gets anywhere: with 1,000 steps of
    1,024 tokens (d_in 576, d_sae 4,608) the rate itself left an FVU of 0.33, six times as much 0.20, ten times as much 0.20
    with an eighth of the features dead.

    Muon's updates are as large as Adam's, so it takes the same rate. Every step of signum moves every weight by the full rate,
    where Adam's moves by a fifth of it: it takes a fifth.

    Source: Gao et al. 2024, appendix A.3 (the exponent); 2e-4 at 2^14 features is the value of the common trainers.
    """
    base = 4e-5 if optimizer == "signum" else 2e-4
    return base * math.sqrt(2**14 / d_sae) * min(6.0, max(1.0, math.sqrt(36_000 / num_steps)))


def lr_factor(step: int, config: TrainConfig) -> float:
    """Returns what the peak learning rate is multiplied by in step `step` (0 is the first); above 0 in every step."""
    num_steps = config.num_steps
    warmup = min(MAX_WARMUP_STEPS, round(num_steps * config.warmup_fraction))
    decay = round(num_steps * config.decay_fraction)
    shape = config.decay or ("constant" if config.optimizer == "signum" else "linear")
    rising = (step + 1) / (warmup + 1) if step < warmup else 1.0
    left = (num_steps - step) / decay if decay and step > num_steps - decay and shape != "constant" else 1.0
    falling = (1 - math.cos(math.pi * left)) / 2 if shape == "cosine" else left
    return min(rising, falling)


def annealed_k(k: int, d_sae: int, progress: float, config: TrainConfig) -> int:
    """Returns the number of features a token uses after a part `progress` of training (0 to 1).

    Linear from `k_start_factor` times k, or all of them, to k at `k_anneal_fraction`, then k; rounded up, so that the end is k.
    """
    sparsity = config.sparsity
    if sparsity.k_start_factor == 1.0 or progress >= sparsity.k_anneal_fraction:
        return k
    start = min(float(d_sae), k * sparsity.k_start_factor)
    return math.ceil(start + (k - start) * progress / sparsity.k_anneal_fraction)
