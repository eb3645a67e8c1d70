"""A step in parts: gradients add up over micro-batches, so that less has to be in memory at once and nothing else changes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saekit.training.objective import Objective, StepResult

__all__ = ["backward_in_parts", "joined"]


def backward_in_parts(
    objective: Objective,
    x: Tensor,
    dead: Tensor,
    coefficient: float,
    *,
    part_tokens: int | None,
    weight: float = 1.0,
    before_last: Callable[[], None] | None = None,
) -> StepResult:
    """Adds the gradient of the loss of x [N, d_in] to the parameters, and returns its figures without graph.

    Losses are means over tokens, so that the loss of the batch is the mean of its parts' by their sizes; what is not (the
    residual variance of AuxK, the selection of BatchTopK) is measured over the whole batch first.

    Args:
        objective: the loss.
        x: this process's share of a batch, normalised.
        dead: indices of the dead features [n_dead].
        coefficient: weight of the sparsity penalty.
        part_tokens: tokens at a time; None = all.
        weight: multiplies the gradient, not the figures.
        before_last: called before the last backward.
    """
    parts = torch.split(x, part_tokens or max(1, len(x)))
    objective.prepare(parts, dead)
    results = []
    for number, part in enumerate(parts, start=1):
        result = objective(part, dead, coefficient)
        share = len(part) / len(x)
        if number == len(parts) and before_last is not None:
            before_last()
        (result.loss * (share * weight)).backward()
        means = [value.detach() * share for value in (result.loss, result.fvu, result.auxiliary)]
        results.append(StepResult(means[0], means[1], means[2], result.num_active, result.fired))
    return joined(results)


def joined(results: Sequence[StepResult]) -> StepResult:
    """Returns the figures of a batch from those of its parts, whose means are weighted by the parts' shares already."""
    return StepResult(
        torch.stack([result.loss for result in results]).sum(),
        torch.stack([result.fvu for result in results]).sum(),
        torch.stack([result.auxiliary for result in results]).sum(),
        torch.stack([result.num_active for result in results]).sum(),
        torch.stack([result.fired for result in results]).any(0),
    )
