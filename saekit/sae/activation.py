"""The nonlinearities of released dictionaries, each kept apart from its near relatives by an explicit, frozen spec."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from saekit.config import Config
from saekit.errors import ConfigError

__all__ = [
    "Activation",
    "BatchTopK",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "LayerTopK",
    "MatchingPursuit",
    "ReLU",
    "TanhReLU",
    "TopK",
    "activate",
    "pursue",
]


class ReLU(Config):
    """`relu(p)`."""

    kind: Literal["relu"] = "relu"
    """Nonlinearity."""


class TanhReLU(Config):
    """`tanh(relu(p))`, of early SAELens."""

    kind: Literal["tanh_relu"] = "tanh_relu"
    """Nonlinearity."""


class JumpReLU(Config):
    """`p` where `p > threshold`, strictly; the variants differ only where a threshold is below 0."""

    kind: Literal["jumprelu"] = "jumprelu"
    """Nonlinearity."""
    negative: Literal["zero", "keep"] = "zero"
    """What becomes of a pre-activation above its threshold but below 0: `relu(p) * (p > t)`, or `p * (p > t)`."""


class TopK(Config):
    """The k largest pre-activations of a token."""

    kind: Literal["topk"] = "topk"
    """Nonlinearity."""
    k: int = Field(ge=1)
    """Features a token may use."""
    by: Literal["value", "magnitude"] = "value"
    """What is compared."""
    negative: Literal["zero", "keep"] = "zero"
    """What becomes of a selected pre-activation below 0."""


class BatchTopK(Config):
    """The N * k largest of a batch after relu: what a token uses depends on its batch."""

    kind: Literal["batchtopk"] = "batchtopk"
    """Nonlinearity."""
    k: int = Field(ge=1)
    """Features a token uses on average."""
    by_layer: bool = False
    """Multi-layer dictionaries: whether each layer keeps its own N * k, or all of them N * k together."""


class LayerTopK(Config):
    """The largest of a token over all L layers jointly, after relu; multi-layer dictionaries only."""

    kind: Literal["layertopk"] = "layertopk"
    """Nonlinearity."""
    k: int = Field(ge=1)
    """Features a token uses: on average in a layer, L * k in all, or in all; see `by_layer`."""
    by_layer: bool = True
    """Whether k counts for each layer."""


class GroupMax(Config):
    """The largest of each of k groups of neighboring features, after relu."""

    kind: Literal["groupmax"] = "groupmax"
    """Nonlinearity."""
    k: int = Field(ge=1)
    """Groups."""


class MatchingPursuit(Config):
    """One feature after another: each step takes the decoder row that the residual points along most, and subtracts it.

    The encoder is the decoder: `Dictionary` starts from `u - b_dec`. A row that is taken again adds to its activation.

    Source: Mallat and Zhang 1993; the loop and its ends as SAELens 6 has them.
    """

    kind: Literal["matching_pursuit"] = "matching_pursuit"
    """Nonlinearity."""
    residual_threshold: float = Field(ge=0)
    """A token is done when the norm of its residual is below this, in units of raw input; 0: never by this."""
    max_iterations: int = Field(ge=1)
    """Steps at most."""
    stop_on_duplicate_support: bool = True
    """Whether a token is done when a step adds no new feature."""


class Gated(Config):
    """`relu(m)` where `p > 0`, with a magnitude `m` of its own: see `Dictionary.b_mag`."""

    kind: Literal["gated"] = "gated"
    """Nonlinearity."""


Activation = Annotated[
    ReLU | TanhReLU | JumpReLU | TopK | BatchTopK | LayerTopK | GroupMax | MatchingPursuit | Gated,
    Field(discriminator="kind"),
]
"""Any of the nonlinearities, told apart by `kind`."""


def activate(
    spec: Activation,
    pre_acts: Tensor,
    *,
    threshold: Tensor | None = None,
    score_scale: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Returns dense feature activations of pre-activations; NaN stays NaN.

    Args:
        pre_acts: [N, F], or [N, L, F] for multi-layer dictionaries.
        threshold: broadcasts to pre_acts; JumpReLU only.
        score_scale: broadcasts to pre_acts; the top-k kinds compare `p * score_scale` and return `p`. None: 1.
        magnitude: like pre_acts; Gated only.

    Raises:
        ConfigError: k is more than there is to choose from, or the nonlinearity is no function of pre-activations.
    """
    match spec:
        case ReLU():
            return torch.relu(pre_acts)
        case TanhReLU():
            return torch.tanh(torch.relu(pre_acts))
        case JumpReLU():
            assert threshold is not None
            kept = pre_acts.masked_fill(pre_acts <= threshold, 0.0)
            return torch.relu(kept) if spec.negative == "zero" else kept
        case Gated():
            assert magnitude is not None
            return torch.relu(magnitude).masked_fill(pre_acts <= 0, 0.0)
        case GroupMax():
            return _group_max(pre_acts, spec.k)
        case TopK():
            scores = pre_acts.abs() if spec.by == "magnitude" else pre_acts
            kept = _largest(pre_acts, _scaled(scores, score_scale), spec.k)
            return torch.relu(kept) if spec.negative == "zero" else kept
        case LayerTopK():
            flat, scores = _after_relu(pre_acts, score_scale, first=1)
            return _largest(flat, scores, spec.k * (pre_acts.shape[1] if spec.by_layer else 1)).view_as(pre_acts)
        case BatchTopK(by_layer=True):
            first = pre_acts.transpose(0, 1)  # [L, N, F]
            flat, scores = _after_relu(first, None if score_scale is None else score_scale[:, None], first=1)
            kept = _largest(flat, scores, min(spec.k * len(pre_acts), flat.shape[1]))
            return kept.view_as(first).transpose(0, 1)
        case BatchTopK():
            flat, scores = _after_relu(pre_acts, score_scale, first=0)
            return _largest(flat, scores, min(spec.k * len(pre_acts), flat.numel())).view_as(pre_acts)
        case MatchingPursuit():
            raise ConfigError("dictionary: matching pursuit reads residuals, needs a Dictionary; use pursue")


def pursue(spec: MatchingPursuit, centred: Tensor, W_dec: Tensor) -> Tensor:
    """Returns dense feature activations [N, F] of centred inputs [N, d_in] by matching pursuit over the rows of W_dec [F, d_in]."""
    acts = centred.new_zeros(len(centred), len(W_dec))
    residual, rows = centred, torch.arange(len(centred), device=centred.device)
    # Rows that are done are dropped, and what they found by then is kept.
    for _ in range(spec.max_iterations):
        if not len(rows):
            break
        best = (residual @ W_dec.T).argmax(dim=1)
        chosen = W_dec[best]
        value = torch.relu((residual * chosen).sum(dim=1))
        before = acts[rows, best]
        acts.index_put_((rows, best), before + value)
        residual = residual - value[:, None] * chosen
        # Nothing to gain now is nothing to gain ever.
        done = value == 0
        if spec.stop_on_duplicate_support:
            done |= before != 0
        if spec.residual_threshold > 0:
            done |= residual.norm(dim=1) < spec.residual_threshold
        residual, rows = residual[~done], rows[~done]
    return acts


def _scaled(scores: Tensor, score_scale: Tensor | None) -> Tensor:
    return scores if score_scale is None else scores * score_scale


def _after_relu(pre_acts: Tensor, score_scale: Tensor | None, *, first: int) -> tuple[Tensor, Tensor]:
    acts = torch.relu(pre_acts)
    return acts.flatten(first), _scaled(acts, score_scale).flatten(first)


def _largest(values: Tensor, scores: Tensor, k: int) -> Tensor:
    """Returns `values` at the k largest scores of the last axis, 0 elsewhere."""
    if k > scores.shape[-1]:
        raise ConfigError(f"dictionary: k is {k}, needs at most {scores.shape[-1]} to choose from")
    indices = torch.topk(scores, k, dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, indices, values.gather(-1, indices))


def _group_max(pre_acts: Tensor, k: int) -> Tensor:
    grouped = torch.relu(pre_acts).view(*pre_acts.shape[:-1], k, pre_acts.shape[-1] // k)
    best = grouped.max(dim=-1, keepdim=True)
    return torch.zeros_like(grouped).scatter(-1, best.indices, best.values).flatten(-2)
