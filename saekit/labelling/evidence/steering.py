"""A model on fixed contexts with features turned up: its last hidden states, and how far its next-token distribution moves."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.errors import ConfigError
from saekit.models import LanguageModel, can_run_from, capture, find_unembedding, replace, run_from
from saekit.sae import SAE

__all__ = ["MatchedPush", "SteeredContexts", "chosen_features", "match_kl"]

MAX_TRIES = 12
"""Forwards spent on one feature's strength; KL grows like the square of it at first, so three or four are usual."""
TOLERANCE = 0.1
"""A reached KL counts as the target within this share of it."""
MAX_STEP = 8.0
"""Largest factor between two strengths tried, until the target lies between two of them."""


class SteeredContexts:
    """Contexts of a model in which a dictionary's features are pushed where they write.

    Attributes:
        tokens: int64 [B, T].
        hook_point: where the features write.
        unembedding: of the model.
        clean: hidden states at the hook point, [B, T, D].
        normed: mean of the clean normed last hidden states over contexts and positions but the first, float32 [d_model].
    """

    def __init__(self, lm: LanguageModel, sae: SAE, tokens: Tensor, *, where: str = "token change") -> None:
        """Runs the clean forward.

        Raises:
            ConfigError: the dictionary does not say its hook point.
        """
        if sae.hook_point_out is None:
            raise ConfigError(f"{where}: the dictionary names no hook point, needs one to steer at; set sae.hook_point")
        self._lm = lm
        self.tokens = tokens
        self.hook_point = sae.hook_point_out
        self.unembedding = find_unembedding(lm)
        self.clean = capture(lm, tokens, [self.hook_point])[self.hook_point]
        last = self.last_hidden(self.clean[None])
        self.normed = self.mean_normed(last)[0]
        self._clean_log_probs: Tensor | None = None
        self._clean_last = last[0]

    def last_hidden(self, hidden: Tensor) -> Tensor:
        """Returns what the final norm is given [n, B, T, d_model] if the hidden states at the hook point are `hidden` [n, B, T, D]."""
        found: list[Tensor] = []

        def stop(last: Tensor) -> Tensor:
            found.append(last)
            raise _ReachedError

        # Asked here first, as the answer is found by forwards that must reach their end.
        can_run_from(self._lm, self.hook_point)
        flat = hidden.reshape(-1, *hidden.shape[2:]).to(self.clean.dtype)
        tokens = self.tokens.repeat(len(hidden), 1)
        with contextlib.suppress(_ReachedError), replace(self._lm, f"{self.unembedding.norm_path}:input", stop):
            run_from(self._lm, self.hook_point, flat, tokens)
        return found[0].reshape(*hidden.shape[:-1], found[0].shape[-1])

    def pushed(self, rows: Tensor, strengths: Tensor) -> Tensor:
        """Returns the last hidden states [n, B, T, d_model] with `strengths` [n] times `rows` [n, D] added, but at the first position.

        Models keep their attention sink at the first position.
        """
        steered = self.clean.float()[None].repeat(len(rows), 1, 1, 1)
        steered[:, :, 1:] += (rows * strengths[:, None])[:, None, None]
        return self.last_hidden(steered)

    def mean_normed(self, last: Tensor) -> Tensor:
        """Returns the normed last hidden states, averaged over contexts and positions but the first, float32 [n, d_model]."""
        with torch.no_grad():
            normed: Tensor = self.unembedding.norm(last)
        return normed[:, :, 1:].float().mean(dim=(1, 2))

    def kl(self, last: Tensor) -> Tensor:
        """Returns KL(clean || steered) in nats, averaged over contexts and positions but the first, float64 [n]."""
        if self._clean_log_probs is None:
            self._clean_log_probs = self._log_probs(self._clean_last)
        clean = self._clean_log_probs
        # One feature at a time: a distribution over 256k tokens is a megabyte a position.
        return torch.stack([(clean.exp() * (clean - self._log_probs(one))).sum(-1).double().mean() for one in last])

    def logit_change(self, moved: Tensor) -> Tensor:
        """Returns the change of the logits [n, V] for a change of the normed last hidden states [n, d_model], before any softcap."""
        return moved @ self.unembedding.weight.float().T * self.unembedding.scale

    def _log_probs(self, last: Tensor) -> Tensor:
        return torch.log_softmax(self.unembedding.logits(last[:, 1:]), dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedPush:
    """Strengths that move the model equally far."""

    strengths: Tensor
    """Factor of each row, float32 [n]."""
    kl: Tensor
    """KL reached, nats, float64 [n]; off the target where no strength reaches it."""
    normed: Tensor
    """Mean normed last hidden states at those strengths, float32 [n, d_model]."""


def match_kl(contexts: SteeredContexts, rows: Tensor, start: Tensor, *, target: float) -> MatchedPush:
    """Returns the strengths at which pushing each row moves the next-token distribution by `target` nats.

    A bracketing search in log strength and log KL, all rows at once.

    Args:
        rows: decoder rows [n, D].
        start: first guess [n], not 0; its sign is kept.
        target: KL(clean || steered), averaged over positions and contexts, nats.

    Source:
        Gur-Arieh et al. 2025, section 3.2, fix the KL rather than the clamp for their output-based evaluation.
    """
    size = len(rows)
    log_s = start.abs().double().clamp_min(1e-12).log()
    low, high = torch.full_like(log_s, -torch.inf), torch.full_like(log_s, torch.inf)
    low_kl, high_kl = torch.full_like(log_s, torch.nan), torch.full_like(log_s, torch.nan)
    best_s, best_kl = start.double().clone(), torch.full_like(log_s, torch.nan)
    best_off = torch.full_like(log_s, torch.inf)
    normed = torch.zeros(size, len(contexts.normed), device=rows.device)
    active = torch.arange(size, device=rows.device)
    goal = float(np.log(target))
    for _ in range(MAX_TRIES):
        strengths = (log_s[active].exp() * start[active].sign()).float()
        last = contexts.pushed(rows[active], strengths)
        reached = contexts.kl(last).to(log_s.device)
        log_kl = torch.nan_to_num(reached, nan=torch.inf).clamp_min(1e-12).log()
        off = (log_kl - goal).abs()
        better = off < best_off[active]
        won = active[better]
        best_off[won], best_kl[won], best_s[won] = off[better], reached[better], strengths[better].double()
        normed[won] = contexts.mean_normed(last[better])
        is_under = log_kl < goal
        under, over = active[is_under], active[~is_under]
        low[under], low_kl[under] = log_s[under], log_kl[is_under]
        high[over], high_kl[over] = log_s[over], log_kl[~is_under]
        is_done = off < np.log1p(TOLERANCE)
        log_s[active] = _next(low[active], high[active], low_kl[active], high_kl[active], goal)
        active = active[~is_done]
        if not len(active):
            break
    return MatchedPush(strengths=best_s.float(), kl=best_kl, normed=normed)


def _next(low: Tensor, high: Tensor, low_kl: Tensor, high_kl: Tensor, goal: float) -> Tensor:
    """Returns the log strengths to try next: between the ends where both are known, else a step as if KL were quadratic."""
    share = ((goal - low_kl) / (high_kl - low_kl)).nan_to_num(0.5).clamp(0.1, 0.9)
    between = low + share * (high - low)
    step = float(np.log(MAX_STEP))
    upward = low + ((goal - low_kl) / 2).clamp(0.05, step)
    downward = high - ((high_kl - goal) / 2).clamp(0.05, step)
    return torch.where(high.isinf(), upward, torch.where(low.isinf(), downward, between))


def chosen_features(sae: SAE, features: Sequence[int], *, where: str = "token change") -> NDArray[np.int64]:
    """Returns the features asked for, ascending and once each.

    Raises:
        ConfigError: one is not in the dictionary.
    """
    chosen = np.unique(np.asarray(features, dtype=np.int64))
    if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < sae.cfg.d_sae:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise ConfigError(f"{where}: feature {wrong}, the dictionary has features 0 to {sae.cfg.d_sae - 1}")
    return chosen


class _ReachedError(Exception):
    """Ends a forward at the final norm."""
