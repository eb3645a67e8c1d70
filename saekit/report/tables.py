"""The index of a run: one small columnar file with everything that its feature table searches, sorts and filters by."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.records import Label, Score
from saekit.report.payload import JSONValue, pack
from saekit.report.sources import RunSource
from saekit.report.text import Pieces

__all__ = ["NO_WORD", "NUM_WORDS", "build_index", "primary_scorer"]

NUM_WORDS = 4
"""Peak tokens and promoted tokens that the table shows and searches, per feature."""
NO_WORD = 0xFFFFFFFF
"""Marks an unused place among the words of a feature."""


def build_index(
    run: RunSource, pieces: Pieces, peak_tokens: Sequence[NDArray[np.int32]], *, chunk_size: int
) -> dict[str, JSONValue]:
    """Returns the index; `peak_tokens[f]` are the tokens at the peaks of feature f's top contexts, strongest first."""
    words: dict[str, int] = {}
    return {
        "count": run.d_sae,
        "chunk_size": chunk_size,
        "density": None if run.density is None else pack(run.density.astype(np.float32)),
        "max": None if run.contexts is None else pack(run.contexts.max_act.astype(np.float32)),
        "peak": None if run.contexts is None else pack(_peak_words(peak_tokens, pieces, words)),
        "promoted": None if "vocabproj" not in run.effects else pack(_promoted_words(run, pieces, words)),
        "labelers": [_labeler_columns(run, labeler) for labeler in run.labelers],
        # Last, because the columns above fill it.
        "words": list(words),
    }


def _peak_words(peak_tokens: Sequence[NDArray[np.int32]], pieces: Pieces, words: dict[str, int]) -> NDArray[np.uint32]:
    """Returns the most frequent peak tokens of each feature, strongest first among equals [F, NUM_WORDS]."""
    result = np.full((len(peak_tokens), NUM_WORDS), NO_WORD, np.uint32)
    for feature, tokens in enumerate(peak_tokens):
        common = Counter(pieces.of_tokens(tokens).tolist()).most_common(NUM_WORDS)
        for slot, (piece, _) in enumerate(common):
            result[feature, slot] = words.setdefault(pieces.strings[piece], len(words))
    return result


def _promoted_words(run: RunSource, pieces: Pieces, words: dict[str, int]) -> NDArray[np.uint32]:
    effects = run.effects["vocabproj"]
    result = np.full((run.d_sae, NUM_WORDS), NO_WORD, np.uint32)
    shown = pieces.of_tokens(effects.promoted_ids[:, :NUM_WORDS])
    for feature, row in zip(effects.features.tolist(), shown.tolist(), strict=True):
        for slot, piece in enumerate(row):
            result[feature, slot] = words.setdefault(pieces.strings[piece], len(words))
    return result


def primary_scorer(scores: Sequence[Score]) -> str | None:
    """Returns the scorer that the table shows for a labeler: the one that scored most labels, `detection` among equals."""
    counts = Counter(score.scorer for score in scores if score.f1 is not None)
    if not counts:
        return None
    return min(counts, key=lambda scorer: (-counts[scorer], scorer))


def _labeler_columns(run: RunSource, labeler: str) -> dict[str, JSONValue]:
    labels: list[JSONValue] = [None] * run.d_sae
    f1 = np.full(run.d_sae, np.nan, np.float32)
    scores = [score for (_, name, _), score in run.scores.items() if name == labeler]
    scorer = primary_scorer(scores)
    for (feature, name), label in run.labels.items():
        if name == labeler and _is_usable(label):
            labels[feature] = label.label
    for score in scores:
        if score.scorer == scorer and score.f1 is not None:
            f1[score.feature] = score.f1
    return {"name": labeler, "scorer": scorer, "labels": labels, "f1": pack(f1)}


def _is_usable(label: Label) -> bool:
    return label.status == "done" and bool(label.label)
