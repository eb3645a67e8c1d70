"""Activations with a known dictionary behind them: features that exclude, imply and accompany each other, at exact rates."""

import math
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saekit.config import Config

__all__ = ["PlantedConfig", "PlantedDictionary", "PlantedSample"]

MAX_SIBLING_PROBABILITY = 0.95
"""Children of an active parent may take so much of its firings together; the rest fires none."""

_STREAM = 0x706C616E


class PlantedConfig(Config):
    """What is planted."""

    num_features: int = Field(default=1024, ge=1)
    """Features; more than an SAE has, so that it has to choose."""
    d_in: int = Field(default=256, ge=1)
    """Width of the activations; less than `num_features` is superposition."""
    max_probability: float = Field(default=0.4, gt=0, lt=1)
    """How often the most frequent feature fires."""
    min_probability: float = Field(default=2e-3, gt=0, lt=1)
    """How often the rarest feature would fire without a parent."""
    zipf_exponent: float = Field(default=0.5, gt=0)
    """How fast frequencies fall with rank."""
    num_roots: int = Field(default=32, ge=0)
    """Features at the top of the trees; 0 = no hierarchy."""
    num_children: int = Field(default=4, ge=1)
    """Children of each parent, of which at most one fires, and only with it."""
    depth: int = Field(default=2, ge=0)
    """Generations below the roots."""
    correlation_rank: int = Field(default=8, ge=0)
    """Common causes of features without a parent; 0 = they are independent."""
    correlation_scale: float = Field(default=0.1, ge=0)
    """Strength of each common cause, in standard deviations."""
    bias_norm: float = Field(default=0.5, ge=0)
    """Norm of the constant part of the activations."""
    orthogonal_steps: int = Field(default=100, ge=0)
    """Steps that drive the features' directions apart from each other."""
    seed: int = Field(default=0, ge=0)
    """Of directions, magnitudes and correlations."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_probability > self.max_probability:
            raise ValueError(
                f"min_probability is {self.min_probability}, needs at most max_probability = {self.max_probability}"
            )
        num_in_trees = sum(self.num_roots * self.num_children**level for level in range(self.depth + 1))
        if num_in_trees > self.num_features:
            raise ValueError(f"trees have {num_in_trees} features, need at most num_features = {self.num_features}")
        return self


class PlantedSample(NamedTuple):
    """Drawn activations and what they are made of."""

    x: Tensor
    """Activations [N, d_in] float32."""
    acts: Tensor
    """Magnitudes of the planted features [N, num_features]; 0 where one does not fire."""


class PlantedDictionary:
    """A random dictionary and the law by which its features fire.

    Roots and features outside the trees fire by a Gaussian copula with a few common causes. The children of a parent share one
    uniform draw, which chooses one of them or none: rates, implication and exclusion are exact, without rejection.

    Attributes:
        config: what is planted.
        features: unit directions [num_features, d_in], the most frequent first.
        probabilities: how often each fires [num_features], exactly.
        parents: parent of each feature [num_features], -1 for none.
        bias: constant part of the activations [d_in].

    Source: the generator of SynthSAEBench (arXiv 2602.14687), with another construction of the trees.
    """

    def __init__(self, config: PlantedConfig) -> None:
        """Draws the dictionary from the config's seed."""
        self.config = config
        # Torch's stream of the plain seed is what the first weights of an SAE with this seed are drawn from: they would be the
        # planted directions.
        generator = torch.Generator().manual_seed(config.seed ^ _STREAM)
        num = config.num_features
        self.features = _spread(torch.randn(num, config.d_in, generator=generator), config.orthogonal_steps)
        self._levels = _levels(config)
        self.parents = torch.full((num,), -1)
        for start, end, children in self._levels:
            self.parents[children.flatten()] = torch.arange(start, end).repeat_interleave(config.num_children)
        self.probabilities, self._chances = self._rates()
        loadings = torch.randn(num, config.correlation_rank, generator=generator) * config.correlation_scale
        # Common causes may not be all there is to a feature.
        self._loadings = loadings * (0.9 / loadings.norm(dim=1, keepdim=True).clamp_min(0.9))
        self._own_scale = (1 - self._loadings.square().sum(1)).sqrt()
        self._levels_of_firing = math.sqrt(2) * torch.erfinv(1 - 2 * self._chances)
        self._mean_magnitudes = torch.linspace(5, 4, num)
        self._magnitude_spreads = (0.5 + 0.5 * torch.randn(num, generator=generator)).abs()
        bias = torch.randn(config.d_in, generator=generator)
        self.bias = bias * (config.bias_norm / bias.norm())

    def sample(self, num_tokens: int, generator: torch.Generator) -> PlantedSample:
        """Returns tokens drawn independently of each other.

        Args:
            num_tokens: how many; memory is a few times [num_tokens, num_features].
            generator: a training stream and a test stream have one of their own each.
        """
        num = self.config.num_features
        causes = torch.randn(num_tokens, self.config.correlation_rank, generator=generator)
        level = causes @ self._loadings.T + self._own_scale * torch.randn(num_tokens, num, generator=generator)
        fires = (level > self._levels_of_firing) & (self.parents < 0)
        for start, end, children in self._levels:
            draw = torch.rand(num_tokens, end - start, generator=generator)
            bounds = self._chances[children].cumsum(1)  # [parents, children]
            chosen = (draw[:, :, None] >= bounds).sum(-1)
            is_chosen = torch.nn.functional.one_hot(chosen, children.shape[1] + 1)[:, :, :-1].bool()
            fires[:, children.flatten()] = (is_chosen & fires[:, start:end, None]).flatten(1)
        size = self._mean_magnitudes + self._magnitude_spreads * torch.randn(num_tokens, num, generator=generator)
        acts = torch.where(fires, size.clamp_min(0), 0.0)
        return PlantedSample(acts @ self.features + self.bias, acts)

    def _rates(self) -> tuple[Tensor, Tensor]:
        """How often each feature fires, and the same given that its parent does."""
        config = self.config
        rank = torch.arange(1, config.num_features + 1).float() ** -config.zipf_exponent
        share = (rank - rank.min()) / (rank.max() - rank.min()).clamp_min(torch.finfo(rank.dtype).tiny)
        rates = config.min_probability + (config.max_probability - config.min_probability) * share
        chances = rates.clone()
        for start, end, children in self._levels:
            wanted = rates[children] / rates[start:end, None]
            total = wanted.sum(1, keepdim=True)
            wanted = wanted * (MAX_SIBLING_PROBABILITY / total).clamp(max=1.0)
            chances[children] = wanted
            rates[children] = wanted * rates[start:end, None]
        return rates, chances


def _levels(config: PlantedConfig) -> list[tuple[int, int, Tensor]]:
    """Of each generation that has children: its features `start` to `end`, and their children [end - start, num_children]."""
    levels, start, end = [], 0, config.num_roots
    for _ in range(config.depth if config.num_roots else 0):
        after = end + (end - start) * config.num_children
        levels.append((start, end, torch.arange(end, after).reshape(end - start, config.num_children)))
        start, end = end, after
    return levels


def _spread(directions: Tensor, steps: int) -> Tensor:
    """Unit rows of `directions` [num, d], driven apart by minimising the squares of their cosines."""
    identity = torch.eye(len(directions))
    moved = torch.nn.functional.normalize(directions, dim=1).requires_grad_(True)
    optimizer = torch.optim.Adam([moved], lr=3e-3)
    for _ in range(steps):
        unit = torch.nn.functional.normalize(moved, dim=1)
        optimizer.zero_grad()
        (unit @ unit.T - identity).square().sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    return torch.nn.functional.normalize(moved.detach(), dim=1)
