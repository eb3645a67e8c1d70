"""Two figures a feature that cost no question: how much it writes what it promotes, and how much it fires on it.

Source: Arad, Mueller, Belinkov 2025, "SAEs Are Good for Steering - If You Select the Right Features" (arXiv 2505.20063): input
and output score, both over the 20 tokens that the logit lens gives the decoder row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from saekit.errors import ConfigError, DataError, StoreError
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.evidence.steering import chosen_features
from saekit.labelling.tokencode import code_of_tokens
from saekit.manifest import atomic_write
from saekit.models import LanguageModel, capture, run_from
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["SIDE_SCORES_NAME", "SideScores", "input_scores", "output_scores"]

SIDE_SCORES_NAME = "side_scores.safetensors"
NUM_TOKENS = 20
NUM_CONTEXTS = 100
PROMPT = "From my experience,"
FACTOR = 10.0
"""Times the largest activation of any feature at the prompt's last position."""
BATCH_FEATURES = 16


class SideScores:
    """Input and output scores of some features.

    Attributes:
        features: int64 [n], ascending.
        input_score: float32 [n] in [0, 1]; NaN for a feature that never fires.
        output_score: float32 [n] in [0, 1]; NaN where it was not measured.
    """

    def __init__(
        self, features: NDArray[np.int64], *, input_score: NDArray[np.float32], output_score: NDArray[np.float32]
    ) -> None:
        self.features = features
        self.input_score = input_score
        self.output_score = output_score

    def of(self, feature: int) -> dict[str, float | None]:
        """Returns `input_score` and `output_score` of a feature; None where there is none."""
        slot = int(np.searchsorted(self.features, feature))
        if slot == len(self.features) or self.features[slot] != feature:
            return {"input_score": None, "output_score": None}
        found = {"input_score": float(self.input_score[slot]), "output_score": float(self.output_score[slot])}
        return {name: None if np.isnan(value) else value for name, value in found.items()}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically."""
        arrays: dict[str, NDArray[Any]] = {
            "features": self.features,
            "input_score": self.input_score,
            "output_score": self.output_score,
        }
        with atomic_write(path) as file:
            file.write(save(arrays))

    @classmethod
    def open(cls, path: str | Path) -> "SideScores":
        """Reads what `save` wrote.

        Raises:
            StoreError: the file is missing or broken.
        """
        try:
            arrays = load_file(path)
            return cls(arrays.pop("features"), **arrays)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise StoreError(f"{str(path)!r}: cannot be read as input and output scores: {error}") from error


def input_scores(contexts: FeatureContexts, tokens: NDArray[np.int32], projected: TokenEffects) -> NDArray[np.float32]:
    """Returns, of each projected feature, the share of its top contexts that peak on a token which it promotes [n].

    Args:
        tokens: of the store that the contexts lie in, [R, T].
        projected: vocabulary projection with at least 20 tokens a side, or as many as the vocabulary has.
    """
    promoted = projected.promoted_ids[:, :NUM_TOKENS]
    row = contexts.top_row[projected.features, :NUM_CONTEXTS]
    position = contexts.top_position[projected.features, :NUM_CONTEXTS]
    used = row >= 0
    peaks = np.asarray(tokens)[np.maximum(row, 0), np.maximum(position, 0)]  # [n, K]
    hits = ((peaks[:, :, None] == promoted[:, None, :]).any(axis=2) & used).sum(axis=1)
    count = used.sum(axis=1)
    return np.where(count > 0, hits / np.maximum(count, 1), np.nan).astype(np.float32)


def output_scores(
    lm: LanguageModel,
    sae: SAE,
    projected: TokenEffects,
    *,
    features: Sequence[int],
    progress: Progress = NO_PROGRESS,
) -> NDArray[np.float32]:
    """Returns how likely each feature, added once to a neutral prompt, makes the best of the tokens that it promotes [n].

    (1 - best rank / V) times the largest probability of the 20 tokens, at the prompt's last position, where the decoder row is
    added 10 times as strongly as the strongest feature there; the dictionary's error stays.

    Args:
        projected: vocabulary projection that holds every one of `features`.
        features: which to steer, ascending.

    Raises:
        ConfigError: the dictionary does not say its hook point, or lacks one of the features.
        DataError: the tokenizer makes nothing of the prompt.
    """
    hook_point = sae.hook_point_out
    if hook_point is None or sae.hook_point is None:
        raise ConfigError("output score: the dictionary names no hook point, needs one to steer at; set sae.hook_point")
    chosen = chosen_features(sae, features, where="output score")
    ids = [int(str(token)) for token in lm.tokenizer(PROMPT)["input_ids"]]
    if not ids:
        raise DataError(f"output score: the tokenizer gives {PROMPT!r} no tokens, needs at least one")
    tokens = torch.tensor([ids])
    clean = capture(lm, tokens, [hook_point])[hook_point].float()  # [1, T, D]
    strength = FACTOR * _largest_act(lm, sae, tokens)
    scores = np.empty(len(chosen), dtype=np.float32)
    slots = np.searchsorted(projected.features, chosen)
    with torch.no_grad(), progress.task("output scores", len(chosen), "features") as task:
        for start in range(0, len(chosen), BATCH_FEATURES):
            part = slice(start, start + BATCH_FEATURES)
            rows = sae.written_rows(torch.from_numpy(chosen[part]).to(sae.W_dec.device)).float().to(clean.device)
            steered = clean.repeat(len(rows), 1, 1)
            steered[:, -1] += strength * rows
            logits = run_from(lm, hook_point, steered, tokens.repeat(len(rows), 1))[:, -1]  # [n, V]
            promoted = torch.from_numpy(projected.promoted_ids[slots[part], :NUM_TOKENS]).to(logits.device)
            best = logits.gather(1, promoted).amax(dim=1, keepdim=True)
            rank = (logits > best).sum(dim=1)
            probability = torch.softmax(logits, dim=-1).gather(1, promoted).amax(dim=1)
            scores[part] = ((1 - rank / logits.shape[-1]) * probability).cpu().numpy()
            task.advance(len(rows))
    return scores


def _largest_act(lm: LanguageModel, sae: SAE, tokens: Tensor) -> float:
    """Returns the largest activation of any feature at the last position of a prompt [1, T]; 0 where none fires."""
    acts = code_of_tokens(lm, sae, tokens)[0][:, -1]
    return float(acts.max()) if acts.numel() else 0.0
