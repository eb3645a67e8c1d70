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
    "ReLU",
    "TanhReLU",
    "TopK",
    "activate",
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


class LayerTopK(Config):
    """The L * k largest of a token over all layers jointly, after relu; multi-layer dictionaries only."""

    kind: Literal["layertopk"] = "layertopk"
    """Nonlinearity."""
    k: int = Field(ge=1)
    """Features a token uses on average in a layer."""


class GroupMax(Config):
    """The largest of each of k groups of neighboring features, after relu."""

    kind: Literal["groupmax"] = "groupmax"
    """Nonlinearity."""
    k: int = Field(ge=1)
    """Groups."""


class Gated(Config):
    """`relu(m)` where `p > 0`, with a magnitude `m` of its own: see `Dictionary.b_mag`."""

    kind: Literal["gated"] = "gated"
    """Nonlinearity."""


Activation = Annotated[
    ReLU | TanhReLU | JumpReLU | TopK | BatchTopK | LayerTopK | GroupMax | Gated, Field(discriminator="kind")
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
        ConfigError: k is more than there is to choose from.
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
            return _largest(flat, scores, spec.k * pre_acts.shape[1]).view_as(pre_acts)
        case BatchTopK():
            flat, scores = _after_relu(pre_acts, score_scale, first=0)
            return _largest(flat, scores, min(spec.k * len(pre_acts), flat.numel())).view_as(pre_acts)


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
