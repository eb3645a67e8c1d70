"""TokenChange: what adding a feature to the hidden states does to the model's next-token logits.

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 2.
There every feature is clamped to +10 and -10 through the SAE's reconstruction, see `saekit.labelling.evidence.clamp`. Here the
decoder row is added to the true hidden states, as strongly as it takes to move the next-token distribution by a given KL, so that
neither the SAE's error nor the units of its activations matter and every feature gets the same say.
Logits are taken before a family's softcap: there they are linear in the normed hidden states, so the mean over positions can go
first and the head runs once per feature for the logits; the KL, after any softcap, needs it at every position.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from saekit.activations import StoreView
from saekit.config import Config
from saekit.errors import DataError
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.evidence.steering import MatchedPush, SteeredContexts, chosen_features, match_kl
from saekit.models import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["TokenChangeConfig", "start_strengths", "steering_contexts", "steering_strengths", "token_change"]


class TokenChangeConfig(Config):
    """How much steering to pay for, and how strong."""

    num_features: int = Field(default=200, ge=0)
    """Features steered where `features` is None: those whose labels predict best."""
    features: tuple[int, ...] | None = None
    """Exactly these features instead."""
    num_contexts: int = Field(default=4, ge=1)
    """Pieces of real text that are steered."""
    context_len: int = Field(default=12, ge=2)
    """Tokens of each; the first is not steered but by `clamp`, as models keep their attention sink there."""
    match: Literal["kl", "max_act", "clamp"] = "kl"
    """How strength is set. `kl`: so that the next-token distribution moves by `kl_target`; `max_act`: `strength` times the
    feature's largest activation; `clamp`: the activation is set to `clamp` and to its negative at every position, in the
    dictionary's reconstruction without its error, as in the paper."""
    kl_target: float = Field(default=0.5, gt=0)
    """Nats, KL(clean || steered) averaged over positions, reached within 10 %."""
    strength: float = Field(default=1.0, gt=0)
    """How much of the decoder row is added, in units of the feature's largest activation in the training documents; for `kl`
    where the search begins."""
    clamp: float = Field(default=10.0, gt=0)
    """Activation that `clamp` sets; 10 in the paper."""
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
        strengths: factor of the decoder row for each feature of the dictionary, float32 [F]; with `match = "kl"` first guesses.
        tokens: contexts [B, T], see `steering_contexts`.
        config: its `match` is `kl` or `max_act`; for `clamp` see `clamped_token_change`.

    Raises:
        ConfigError: the dictionary does not say its hook point, or a feature that it does not have.
    """
    assert config.match != "clamp", "clamped_token_change does that"
    chosen = chosen_features(sae, features)
    contexts = SteeredContexts(lm, sae, tokens)
    parts: list[TokenEffects] = []
    with torch.no_grad(), progress.task("token change", len(chosen), "features") as task:
        for start in range(0, len(chosen), config.batch_features):
            chunk = chosen[start : start + config.batch_features]
            rows = sae.written_rows(torch.from_numpy(chunk).to(sae.W_dec.device)).float().to(contexts.clean.device)
            first = torch.from_numpy(strengths[chunk]).to(rows)
            push = _pushed(contexts, rows, first, config)
            change = contexts.logit_change(push.normed - contexts.normed)
            parts.append(
                TokenEffects.from_logits(
                    "tokenchange",
                    chunk,
                    change,
                    num=config.num_tokens,
                    strength=push.strengths.cpu().numpy(),
                    kl=push.kl.float().cpu().numpy(),
                )
            )
            task.advance(len(chunk))
    return TokenEffects.join(parts) if parts else TokenEffects.empty("tokenchange")


def _pushed(contexts: SteeredContexts, rows: Tensor, first: Tensor, config: TokenChangeConfig) -> MatchedPush:
    if config.match == "kl":
        return match_kl(contexts, rows, first, target=config.kl_target)
    last = contexts.pushed(rows, first)
    unknown = torch.full(first.shape, torch.nan, dtype=torch.float64, device=first.device)
    return MatchedPush(strengths=first, kl=unknown, normed=contexts.mean_normed(last))


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
    return start_strengths(contexts.max_act, strength=strength)


def start_strengths(max_act: NDArray[np.float32], *, strength: float = 1.0) -> NDArray[np.float32]:
    """Returns `strength` times the largest activations [F]; those of silent features are the median of the others."""
    fires = max_act > 0
    usual = float(np.median(max_act[fires])) if fires.any() else 1.0
    return (strength * np.where(fires, max_act, usual)).astype(np.float32)
