"""TokenChange: what adding a feature to the hidden states does to the model's next-token logits.

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 2.
There every feature is clamped to +10 through the SAE's reconstruction. Here the decoder row, as strong as the feature itself
gets in the data, is added to the true hidden states, so that neither the SAE's error nor the units of its activations matter.
Logits are taken before a family's softcap: there they are linear in the normed hidden states, so the mean over positions can go
first and the head, half of the cost of a small model, runs once per feature instead of once per token.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from saekit.activations import StoreView
from saekit.config import Config
from saekit.errors import ConfigError, DataError
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.models import LanguageModel, Unembedding, can_run_from, capture, find_unembedding, replace, run_from
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["TokenChangeConfig", "steering_contexts", "steering_strengths", "token_change"]


class TokenChangeConfig(Config):
    """How much steering to pay for."""

    num_features: int = Field(default=200, ge=0)
    """Features steered where `features` is None: those whose labels predict best."""
    features: tuple[int, ...] | None = None
    """Exactly these features instead."""
    num_contexts: int = Field(default=4, ge=1)
    """Pieces of real text that are steered."""
    context_len: int = Field(default=12, ge=2)
    """Tokens of each; the first is never steered, as models keep their attention sink there."""
    strength: float = Field(default=1.0, gt=0)
    """How much of the decoder row is added, in units of the feature's largest activation in the training documents."""
    batch_features: int = Field(default=8, ge=1)
    """Features steered in one forward; memory only."""
    num_tokens: int = Field(default=20, ge=1)
    """Tokens kept on each side."""


def token_change(
    lm: LanguageModel,
    sae: SAE,
    *,
    features: Sequence[int],
    strengths: NDArray[np.float32],
    tokens: Tensor,
    config: TokenChangeConfig,
    progress: Progress = NO_PROGRESS,
) -> TokenEffects:
    """Returns the tokens whose logits rise and fall most, on average over contexts and positions, under each feature.

    Args:
        lm: the model that the dictionary was trained on.
        sae: names its hook point; a transcoder the one that it predicts.
        features: which to steer.
        strengths: factor of the decoder row for each feature of the dictionary, float32 [F].
        tokens: contexts [B, T], see `steering_contexts`.

    Raises:
        ConfigError: the dictionary does not say its hook point, or a feature that it does not have.
    """
    hook_point = sae.hook_point_out
    if hook_point is None:
        raise ConfigError("token change: the dictionary names no hook point, needs one to steer at; set sae.hook_point")
    chosen = np.unique(np.asarray(features, dtype=np.int64))
    if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < sae.cfg.d_sae:
        raise ConfigError(f"token change: feature {chosen[-1]}, the dictionary has features 0 to {sae.cfg.d_sae - 1}")
    unembedding = find_unembedding(lm)
    clean = capture(lm, tokens, [hook_point])[hook_point]  # [B, T, D]
    before = _mean_normed(lm, unembedding, hook_point, clean, tokens).mean(dim=0)  # [D]
    parts: list[TokenEffects] = []
    with torch.no_grad(), progress.task("token change", len(chosen), "features") as task:
        for start in range(0, len(chosen), config.batch_features):
            chunk = chosen[start : start + config.batch_features]
            rows = sae.written_rows(torch.from_numpy(chunk).to(sae.W_dec.device)).float().to(clean.device)
            push = rows * torch.from_numpy(strengths[chunk]).to(clean.device)[:, None]  # [n, D]
            steered = clean.float()[None].repeat(len(chunk), 1, 1, 1)  # [n, B, T, D]
            steered[:, :, 1:] += push[:, None, None]
            flat = steered.reshape(-1, *clean.shape[1:]).to(clean.dtype)
            after = _mean_normed(lm, unembedding, hook_point, flat, tokens.repeat(len(chunk), 1))  # [n * B, D]
            moved = after.reshape(len(chunk), -1, after.shape[-1]).mean(dim=1) - before
            change = moved @ unembedding.weight.float().T * unembedding.scale  # [n, V]
            parts.append(TokenEffects.from_logits("tokenchange", chunk, change, num=config.num_tokens))
            task.advance(len(chunk))
    return TokenEffects.join(parts) if parts else TokenEffects.empty("tokenchange")


class _ReachedError(Exception):
    """Ends a forward at the final norm."""


def _mean_normed(
    lm: LanguageModel, unembedding: Unembedding, hook_point: str, hidden: Tensor, tokens: Tensor
) -> Tensor:
    """Returns the normed last hidden states of a forward continued from `hidden`, averaged over steered positions [B, D]."""
    found: list[Tensor] = []

    def stop(last: Tensor) -> Tensor:
        found.append(last)
        raise _ReachedError

    # Asked here first, as the answer is found by forwards that must reach their end.
    can_run_from(lm, hook_point)
    with contextlib.suppress(_ReachedError), replace(lm, f"{unembedding.norm_path}:input", stop):
        run_from(lm, hook_point, hidden, tokens)
    normed: Tensor = unembedding.norm(found[0])
    return normed[:, 1:].float().mean(dim=1)


def steering_contexts(view: StoreView, *, config: TokenChangeConfig, seed: int = 0) -> Tensor:
    """Returns the first tokens of rows drawn at random, int64 [B, T].

    Raises:
        DataError: no row has so many tokens before its padding.
    """
    length = min(config.context_len, view.store.context_len)
    is_whole = np.asarray(view.store.kinds()[:, :length] != 1).all(axis=1)
    rows = np.flatnonzero(is_whole & view.mask[:, 1:length].any(axis=1))
    if not len(rows):
        raise DataError(f"token change: no training row begins with {length} tokens, needs at least one")
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[: config.num_contexts])
    return torch.from_numpy(np.asarray(view.store.tokens()[rows, :length], dtype=np.int64))


def steering_strengths(contexts: FeatureContexts, *, strength: float) -> NDArray[np.float32]:
    """Returns `strength` times each feature's largest activation [F]; silent features get the median of the others."""
    fires = contexts.max_act > 0
    usual = float(np.median(contexts.max_act[fires])) if fires.any() else 1.0
    return (strength * np.where(fires, contexts.max_act, usual)).astype(np.float32)
