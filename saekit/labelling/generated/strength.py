"""How strongly a feature is turned before a text is written: so that the model's predictions move by as much for every feature.

Shapes: n features, K targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.labelling.evidence.clamp import Reconstruction
from saekit.labelling.evidence.steering import SteeredContexts, match_kl

__all__ = ["Strengths", "clamped_strengths", "matched_strengths"]

LARGEST_CLAMP = 1000
"""Source: Gur-Arieh et al. 2025, released notebook: whole numbers from 1 to 1000, or their negatives."""
CLAMP_SLACK = 0.1
"""Nats above the target that still count as it. Source: as above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strengths:
    """What was found for each feature and target."""

    values: Tensor
    """Factor of the decoder row, or the activation that is set; signed as the target, float32 [n, K]."""
    kl: Tensor
    """KL(clean || steered) there, nats, float64 [n, K]."""


def matched_strengths(contexts: SteeredContexts, rows: Tensor, start: Tensor, targets: Sequence[float]) -> Strengths:
    """Returns factors of decoder rows [n, D] that move the model by the targets, as token changes are measured.

    Args:
        start: first guess for each row [n], above 0.
    """
    values, kl = [], []
    guess, last = start, targets[0]
    for target in targets:
        # KL grows about as the square of the strength.
        guess = guess.abs() * abs(target / last) ** 0.5
        push = match_kl(contexts, rows, guess if target > 0 else -guess, target=abs(target))
        values.append(push.strengths)
        kl.append(push.kl)
        guess, last = push.strengths, target
    return Strengths(values=torch.stack(values, dim=1), kl=torch.stack(kl, dim=1))


def clamped_strengths(prompts: Sequence[Reconstruction], features: Tensor, targets: Sequence[float]) -> Strengths:
    """Returns whole activations that, set at every position of the prompts, move the model by the targets.

    By halving, until the KL is at least the target and at most 0.1 nats above it. It is averaged over the positions of a prompt,
    then over prompts, between the reconstructions with and without the change.

    Args:
        prompts: one prompt each, [1, T] tokens.
        features: n of them.

    Source:
        Gur-Arieh et al. 2025, section 3.2 and the released notebook.
    """
    goals = torch.tensor(targets, dtype=torch.float64).repeat(len(features))  # [n * K]
    which = features.repeat_interleave(len(targets))
    clean = [_log_probs(prompt, prompt.x_hat[None])[0] for prompt in prompts]
    low, high = torch.ones_like(goals), torch.full_like(goals, LARGEST_CLAMP)
    values, kl = torch.zeros_like(goals), torch.full_like(goals, torch.nan)
    active = torch.arange(len(goals))
    while len(active):
        middle = ((low[active] + high[active]) / 2).floor()
        signed = middle * goals[active].sign()
        found = torch.stack(
            [
                _divergence(before, _log_probs(prompt, prompt.clamped(which[active], signed)))
                for prompt, before in zip(prompts, clean, strict=True)
            ]
        ).mean(dim=0)
        values[active], kl[active] = signed, found.cpu()
        wanted = goals[active].abs()
        is_under, is_over = kl[active] < wanted, ~(kl[active] <= wanted + CLAMP_SLACK)
        low[active[is_under]] = middle[is_under] + 1
        high[active[is_over]] = middle[is_over] - 1
        active = active[(is_under | is_over) & (low[active] <= high[active])]
    shape = (len(features), len(targets))
    return Strengths(values=values.float().reshape(shape), kl=kl.reshape(shape))


def _log_probs(prompt: Reconstruction, hidden: Tensor) -> Tensor:
    """Returns the next-token log-probabilities at every position, the first included, [n, T, V]."""
    last = prompt.contexts.last_hidden(hidden)
    return torch.log_softmax(prompt.contexts.unembedding.logits(last[:, 0]), dim=-1)


def _divergence(clean: Tensor, steered: Tensor) -> Tensor:
    return torch.stack([(clean.exp() * (clean - one)).sum(-1).double().mean() for one in steered])
