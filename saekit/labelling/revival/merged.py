"""Contexts on the corpus and on probe sentences as one, for the features that woke up.

Shapes: F features, K contexts, W window positions.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.contexts import CodeSample, FeatureContexts
from saekit.labelling.tokenrows import StackedRows

__all__ = ["MergedContexts"]


class MergedContexts(FeatureContexts):
    """Two sets of contexts over the rows of a `StackedRows`; all features but the chosen ones are silent in it."""

    def __init__(
        self,
        path: Path,
        corpus: FeatureContexts,
        probes: FeatureContexts,
        rows: StackedRows,
        features: NDArray[np.int64],
    ) -> None:
        """
        Args:
            path: names the result in errors; nothing is read or written there.
            corpus: over the first rows.
            probes: over the other rows, collected with the same config.
            features: the chosen ones.
        """
        chosen = np.zeros(corpus.num_features, dtype=bool)
        chosen[features] = True
        largest = np.maximum(corpus.max_act, probes.max_act)
        arrays: dict[str, NDArray[np.generic]] = {}
        for kind in ("top", "sample"):
            arrays |= _joined(kind, corpus, probes, rows.num_first_rows, chosen, largest)
        counts = corpus.firing_count + probes.firing_count
        sums = corpus.mean_act * corpus.firing_count + probes.mean_act * probes.firing_count
        arrays |= {
            "firing_count": np.where(chosen, counts, 0),
            "max_act": np.where(chosen, largest, 0).astype(np.float32),
            "mean_act": np.where(chosen, sums / np.maximum(counts, 1), 0).astype(np.float32),
            "position_count": corpus.position_count,
            # Only of the corpus: the two passes may have bins of different scales.
            "histogram": corpus.histogram,
            "histogram_edges": corpus.histogram_edges,
        }
        super().__init__(path, arrays, corpus.num_tokens + probes.num_tokens)
        self._codes = _joined_codes(corpus, probes, rows, chosen)

    def codes(self) -> CodeSample:
        """Returns the sampled tokens of both, with the activations of the chosen features."""
        return self._codes


def _joined(
    kind: str,
    corpus: FeatureContexts,
    probes: FeatureContexts,
    num_rows: int,
    chosen: NDArray[np.bool_],
    largest: NDArray[np.float32],
) -> dict[str, NDArray[np.generic]]:
    parts = {name: [getattr(part, f"{kind}_{name}") for part in (corpus, probes)] for name in _parts(kind)}
    rows = np.concatenate([parts["row"][0], np.where(parts["row"][1] >= 0, parts["row"][1] + num_rows, -1)], axis=1)
    acts = np.concatenate(parts["act"], axis=1)
    used = (rows >= 0) & chosen[:, None]
    # Strongest first, as in each of them; what is not used goes last.
    by = -acts if kind == "top" else np.concatenate(parts["stratum"], axis=1)
    order = np.argsort(np.where(used, by, np.inf), axis=1, kind="stable")
    # A window is scaled by its own pass's largest activation.
    windows = np.concatenate(
        [
            np.round(window * (part.max_act / np.maximum(largest, np.finfo(np.float32).tiny))[:, None, None])
            for window, part in zip(parts["window"], (corpus, probes), strict=True)
        ],
        axis=1,
    ).astype(np.uint8)
    columns = {
        "row": np.where(used, rows, -1),
        "position": np.concatenate(parts["position"], axis=1),
        "act": acts,
        **({"stratum": np.concatenate(parts["stratum"], axis=1)} if kind == "sample" else {}),
    }
    made: dict[str, NDArray[np.generic]] = {
        f"{kind}_{name}": np.take_along_axis(values, order, axis=1) for name, values in columns.items()
    }
    return made | {f"{kind}_window": np.take_along_axis(windows, order[:, :, None], axis=1)}


def _parts(kind: str) -> tuple[str, ...]:
    names = ("row", "position", "act", "window")
    return (*names, "stratum") if kind == "sample" else names


def _joined_codes(
    corpus: FeatureContexts, probes: FeatureContexts, rows: StackedRows, chosen: NDArray[np.bool_]
) -> CodeSample:
    tokens: list[NDArray[np.int64]] = []
    owners: list[NDArray[np.int64]] = []
    indices, acts = [], []
    for part, first_row, context_len in zip(
        (corpus.codes(), probes.codes()), (0, rows.num_first_rows), rows.widths, strict=True
    ):
        kept = chosen[part.indices]
        row, position = np.divmod(part.tokens, context_len)
        owners.append(part.owners()[kept] + sum(len(flat) for flat in tokens))
        tokens.append((row + first_row) * rows.context_len + position)
        indices.append(part.indices[kept])
        acts.append(part.acts[kept])
    counts = np.bincount(np.concatenate(owners), minlength=sum(len(flat) for flat in tokens))
    return CodeSample(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        indices=np.concatenate(indices),
        acts=np.concatenate(acts),
    )
