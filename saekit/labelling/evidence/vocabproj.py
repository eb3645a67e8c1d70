"""VocabProj: a feature's decoder row read as if it were the last hidden state.

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section 2.
Unlike there, the mean over the vocabulary is taken off each row (softmax does not see it) and order and sign are kept.
"""

from collections.abc import Sequence

import numpy as np
import torch

from saekit.errors import ConfigError
from saekit.labelling.evidence.effects import TokenEffects
from saekit.models import Unembedding
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["vocab_projection"]

CHUNK = 128
"""Features projected at a time: 128 x 49,152 logits are 25 MB, and the head is read from memory once per chunk."""


def vocab_projection(
    sae: SAE,
    unembedding: Unembedding,
    *,
    features: Sequence[int] | None = None,
    num: int = 20,
    progress: Progress = NO_PROGRESS,
) -> TokenEffects:
    """Returns the `num` tokens with the largest and the smallest logits of each decoder row.

    Args:
        sae: where its features write is in the residual stream, or writes to it.
        features: which rows; None: all.
        num: tokens on each side.

    Raises:
        ConfigError: the dictionary's rows are not as wide as the residual stream.
    """
    width = unembedding.weight.shape[1]
    if sae.d_out != width:
        raise ConfigError(
            f"vocabulary projection: decoder rows are {sae.d_out} wide, the residual stream is {width}; "
            "set vocab_projection = false for this hook point"
        )
    chosen = np.arange(sae.cfg.d_sae) if features is None else np.unique(np.asarray(features, dtype=np.int64))
    parts: list[TokenEffects] = []
    with torch.no_grad(), progress.task("vocabulary projection", len(chosen), "features") as task:
        for start in range(0, len(chosen), CHUNK):
            chunk = chosen[start : start + CHUNK]
            rows = sae.written_rows(torch.from_numpy(chunk).to(sae.W_dec.device))
            logits = unembedding.project(rows)  # [n, V]
            parts.append(TokenEffects.from_logits("vocabproj", chunk, logits, num=num))
            task.advance(len(chunk))
    return TokenEffects.join(parts) if parts else TokenEffects.empty("vocabproj")
