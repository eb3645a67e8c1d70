"""Resampling: silent features start anew as inputs that the live ones reconstruct badly, with nothing left of their past.

Source: Bricken et al. 2023, "Towards monosemanticity", appendix "Autoencoder training - neuron resampling".
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saekit.activations.source import ActivationSource, lasting
from saekit.sae.base import SAE
from saekit.sae.batch import num_samples, split_batch
from saekit.sae.fold import AnyNormalization
from saekit.training.axis import Axis
from saekit.training.config import TrainConfig
from saekit.training.dead import DeadFeatures
from saekit.training.features import PER_FEATURE, by_feature
from saekit.training.low_bit import LowBitAdamW
from saekit.training.objective import Objective
from saekit.training.schedule_free import ScheduleFreeSignum

if TYPE_CHECKING:
    from saekit.training.run import TrainRun

__all__ = ["Draw", "clear_optimizer", "draw_inputs", "is_due", "largest", "renew_features", "resample_features"]

MAX_SAMPLE_TOKENS = 819_200
PART_TOKENS = 2048


class Draw(NamedTuple):
    """Inputs that were drawn, the first drawn first."""

    inputs: Tensor
    """What the encoder reads [n, d_in], as it multiplies it."""
    targets: Tensor
    """What is to be reconstructed [n, d_out], less b_dec."""


def is_due(config: TrainConfig, step: int) -> bool:
    """Returns whether features are resampled after `step` steps."""
    if config.resample is None:
        return False
    every = config.every_steps(config.resample.every_tokens, parts=8)
    return step % every == 0 and step <= config.resample.until_fraction * config.num_steps


@torch.no_grad()
def resample_features(run: "TrainRun") -> int:
    """Draws silent features anew, the same ones from the same inputs on every process; returns how many."""
    config, data = run.config, run.layout.data
    assert config.resample is not None
    features = silent_features(run.dead, config)
    if not len(features):
        return 0
    tokens = config.resample.sample_tokens or min(MAX_SAMPLE_TOKENS, max(1, config.num_tokens // 10))
    with lasting(run.source) as source:
        keys, draw = draw_inputs(
            run.sae,
            source,
            run.normalization,
            len(features),
            num_batches=math.ceil(tokens / config.batch_size),
            seed=config.seed + run.step,
            shares=partial(_place_in_batch, data, run.layout.device),
        )
    if data.size > 1:
        everyones = [data.gather(value, "resampling").flatten(0, 1) for value in (keys, *draw)]
        keys, draw = largest(everyones[0], Draw(*everyones[1:]), len(features))
    features = features[: int(torch.isfinite(keys).sum())]
    draw = Draw(*(rows[: len(features)] for rows in draw))
    renew_features(run.objective, features, draw, encoder_norm=config.resample.encoder_norm)
    clear_optimizer(run.optimizer, features)
    run.average.restart(features)
    run.dead.renew(features)
    return len(features)


def silent_features(dead: DeadFeatures, config: TrainConfig) -> Tensor:
    """Returns the indices [n] of the features that have been silent for too long, the same on every process."""
    assert config.resample is not None
    every = config.every_steps(config.resample.every_tokens, parts=8) * config.batch_size
    limit = config.resample.silent_tokens or max(1, every // 2)
    return (dead.silent_tokens >= limit).nonzero().flatten()


@torch.no_grad()
def draw_inputs(
    sae: SAE,
    source: ActivationSource,
    normalization: AnyNormalization,
    count: int,
    *,
    num_batches: int,
    seed: int,
    shares: Callable[[int], tuple[int, int]] = lambda count: (0, count),
) -> tuple[Tensor, Draw]:
    """Draws inputs without replacement from the batches that come next, each as probable as the square of its loss.

    The source is moved back to where it was. Every token of a global batch has a random number of its own, so that the draw is
    the same however the batch is shared by processes.

    Args:
        sae: of normalised activations.
        count: inputs to draw; keys of -Inf take the place of those that the batches do not have.
        num_batches: to read.
        seed: of the draw.
        shares: of this process's number of tokens, how many come before them in the batch, and how many the batch has.

    Returns:
        The keys [count] float64, the largest of all processes being the ones that are drawn, and this process's candidates.

    Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir" (keys log(u) / weight).
    """
    samples = num_samples(sae)
    position = source.state_dict()
    device = sae.b_dec.device
    keys = torch.full((count,), -torch.inf, dtype=torch.float64, device=device)
    draw = Draw(*(torch.zeros(count, width, device=device) for width in sae.widths))
    for number in range(num_batches):
        x = normalization.apply(source.next_batch().to(device))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        start, total = shares(len(x))
        uniform = torch.rand(total * samples, dtype=torch.float64, generator=generator)
        own = uniform[start * samples : (start + len(x)) * samples].to(device)
        for part, chance in zip(torch.split(x, PART_TOKENS), torch.split(own, PART_TOKENS * samples), strict=True):
            inputs, target = split_batch(sae, part)
            loss = (target - sae(inputs).x_hat.reshape(target.shape)).double().square().sum(1)
            weight = loss.square().clamp_min(torch.finfo(torch.float64).tiny)
            found = Draw(sae.encoder_input(inputs), target - sae.b_dec)
            keys, draw = largest(torch.cat([keys, chance.log() / weight]), _joined(draw, found), count)
    source.load_state_dict(position)
    return keys, draw


def _place_in_batch(data: Axis, device: torch.device, count: int) -> tuple[int, int]:
    """Returns how many tokens of a batch come before this process's, and how many it has."""
    counts = data.gather(torch.tensor(count, device=device), "resampling").tolist() if data.size > 1 else [count]
    return sum(counts[: data.rank]), sum(counts)


def _joined(one: Draw, other: Draw) -> Draw:
    return Draw(torch.cat([one.inputs, other.inputs]), torch.cat([one.targets, other.targets]))


def largest(keys: Tensor, draw: Draw, count: int) -> tuple[Tensor, Draw]:
    """Returns the `count` largest keys in falling order, and what they belong to."""
    order = keys.argsort(descending=True, stable=True)[:count]
    return keys[order], Draw(draw.inputs[order], draw.targets[order])


@torch.no_grad()
def renew_features(objective: Objective, features: Tensor, draw: Draw, *, encoder_norm: float) -> None:
    """Makes each of the features the direction of an input, with the encoder's row short and all biases 0.

    Thresholds become the live ones' mean in the same proportion as the encoder's rows, so that a new feature is as easily active
    as a live one of its direction.

    Args:
        features: indices [n].
        draw: n inputs.
        encoder_norm: length of an encoder row in multiples of the mean over the other features.
    """
    sae = objective.sae
    parameters = {name: by_feature(name, p.data) for name, p in objective.trained_parameters().items()}
    is_live = torch.ones(sae.d_sae, dtype=torch.bool, device=features.device)
    is_live[features] = False
    others = is_live if bool(is_live.any()) else ~is_live
    norm = parameters["W_enc"][others].norm(dim=1).mean()
    parameters["W_enc"][features] = _unit(draw.inputs) * (encoder_norm * norm)
    length = 1.0 if objective.has_projected_decoder else parameters["W_dec"][others].norm(dim=1).mean()
    parameters["W_dec"][features] = _unit(draw.targets) * length
    for name in ("b_enc", "r_mag", "b_mag"):
        if name in parameters:
            parameters[name][features] = 0.0
    if "log_threshold" in parameters:
        mean = parameters["log_threshold"][others].exp().mean()
        parameters["log_threshold"][features] = (encoder_norm * mean).log()
    objective.settle(has_unit_rows=True)


@torch.no_grad()
def clear_optimizer(optimizer: torch.optim.Optimizer, features: Tensor) -> None:
    """Lets the optimizer forget some features, whose parameters are new: moments are 0, averages are the parameters."""
    for group in optimizer.param_groups:
        name = group["name"]
        if name not in PER_FEATURE:
            continue
        for parameter in group["params"]:
            if isinstance(optimizer, LowBitAdamW):
                optimizer.clear_features(parameter, features)
            for state in optimizer.state[parameter].values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    rows = by_feature(name, state)
                    # What schedule-free steps keep are weights, not moments.
                    is_weight = isinstance(optimizer, ScheduleFreeSignum)
                    rows[features] = by_feature(name, parameter.data)[features] if is_weight else 0.0


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)
