"""The language model with reconstructions in place of activations, and how far that moves its predictions."""

import contextlib
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from saekit.models.hooks import replace
from saekit.models.load import LanguageModel
from saekit.models.run_from import can_run_from, run_from
from saekit.training.rows import RowBatch

__all__ = ["Prediction", "SplicedModel", "model_terms"]


class Prediction(NamedTuple):
    """What the model makes of hidden states."""

    logits: Tensor
    """At the counted positions [c, V], float32."""
    later: list[Tensor]
    """Each later layer's output at the replaced positions [n, D], float32."""


class SplicedModel:
    """A frozen model from a hook point on.

    Attributes:
        lm: the model.
        hook_point: where activations are replaced.
        later: hook points whose values are wanted beside the predictions.
    """

    def __init__(self, lm: LanguageModel, hook_point: str, later: list[str]) -> None:
        """Finds out whether the layers before the hook point can be left out.

        Raises:
            HookPointError: the model has no such module.
        """
        self.lm = lm
        self.hook_point = hook_point
        self.later = later
        can_run_from(lm, hook_point)

    def predict(self, rows: RowBatch, x: Tensor | None = None) -> Prediction:
        """Returns what the model predicts, without graph for its own activations.

        Args:
            rows: token rows with the true activations.
            x: what the replaced positions hold [n, D], with or without a graph; None = the true activations.
        """
        hidden = rows.hidden if x is None else rows.hidden.index_put((rows.is_replaced,), x.to(rows.hidden))
        found: dict[str, Tensor] = {}

        def see(name: str, values: Tensor) -> Tensor:
            found[name] = values[rows.is_replaced.to(values.device)].float()
            return values

        with contextlib.ExitStack() as stack:
            for name in self.later:
                stack.enter_context(replace(self.lm, name, partial(see, name)))
            logits = run_from(
                self.lm,
                self.hook_point,
                hidden,
                rows.tokens,
                attention_mask=rows.attention_mask,
                has_graph=x is not None,
            )
        return Prediction(logits[rows.is_counted.to(logits.device)], [found[name] for name in self.later])


def model_terms(
    true: Prediction, spliced: Prediction, next_tokens: Tensor, later_variances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three sums over positions: KL(true || spliced), cross-entropy of the next tokens, later layers' error.

    The last one is the mean over the later layers of the squared distance in multiples of the layer's variance; 0 without any.

    Args:
        true: predictions without the SAE, constants.
        spliced: predictions with it.
        next_tokens: of the counted positions [c] int64.
        later_variances: E||a - E a||^2 of each later layer.

    Source: Braun et al. 2024, "Identifying functionally important features with end-to-end sparse dictionary learning",
    section 2 (the terms; each layer's error there is not divided by its variance).
    """
    log_q = spliced.logits.log_softmax(dim=-1)
    log_p = true.logits.detach().log_softmax(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    ce = torch.nn.functional.nll_loss(log_q, next_tokens.to(log_q.device), reduction="sum")
    later = log_q.new_zeros(())
    for own, other, variance in zip(true.later, spliced.later, later_variances, strict=True):
        later = later + (other - own.detach()).square().sum() / variance / len(true.later)
    return kl, ce, later
