"""What one feature's panel shows, in files of a few dozen features each, loaded when one of them is opened."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.evidence.effects import EffectKind
from saekit.labelling.records import Label
from saekit.report.judged import controls_by_feature, score_figures
from saekit.report.payload import JSONValue, finite, pack
from saekit.report.selection import ContextBlock
from saekit.report.sources import RunSource
from saekit.report.text import Pieces

__all__ = ["ContextPieces", "feature_chunks", "row_chunks"]


class ContextPieces:
    """The pieces of every shown row, and how contexts refer to them."""

    def __init__(self, rows: NDArray[np.int64], documents: NDArray[np.int32], pieces: Pieces) -> None:
        """
        Args:
            rows: rows of the store that are shown, ascending [R].
            documents: document of each of their tokens [R, T].
            pieces: built with these rows as its only rows.
        """
        self.rows = rows
        self.documents = documents
        self.pieces = pieces.rows[0]  # [R, T]
        self.dtype = np.uint16 if len(pieces.strings) < 0xFFFF else np.uint32
        self.nothing = int(np.iinfo(self.dtype).max)
        self.context_len = self.pieces.shape[1]

    def windows(self, places: NDArray[np.int64], position: NDArray[np.int32], width: int) -> NDArray[np.generic]:
        """Returns the pieces around each peak [C, W]; the largest number of the type where the row has no token."""
        columns = position[:, None].astype(np.int64) - width // 2 + np.arange(width)
        inside = (columns >= 0) & (columns < self.context_len)
        found = self.pieces[places[:, None], np.clip(columns, 0, self.context_len - 1)]
        window: NDArray[np.generic] = np.where(inside, found, self.nothing).astype(self.dtype)
        return window


def row_chunks(shown: ContextPieces, chunk_size: int) -> Iterator[dict[str, JSONValue]]:
    """Yields whole token rows, `chunk_size` at a time: what a context shows when it is expanded."""
    for start in range(0, len(shown.rows), chunk_size):
        part = slice(start, start + chunk_size)
        yield {
            "start": start,
            "row": pack(shown.rows[part].astype(np.uint32)),
            "pieces": pack(shown.pieces[part].astype(shown.dtype)),
        }


def feature_chunks(
    run: RunSource,
    top: ContextBlock | None,
    sampled: ContextBlock | None,
    shown: ContextPieces,
    pieces: Pieces,
    chunk_size: int,
) -> Iterator[dict[str, JSONValue]]:
    """Yields the panels' data, features `n * chunk_size ...` in the n-th chunk."""
    labels = _labels_by_feature(run, pieces)
    controls = controls_by_feature(run)
    measures = None if run.evaluation is None else run.evaluation.features
    for start in range(0, run.d_sae, chunk_size):
        stop = min(start + chunk_size, run.d_sae)
        contexts = run.contexts
        yield {
            "start": start,
            "count": stop - start,
            "top": None if top is None else _contexts(top, shown, start, stop),
            "sampled": None if sampled is None else _contexts(sampled, shown, start, stop),
            "firings": None if contexts is None else pack(contexts.firing_count[start:stop].astype(np.uint32)),
            "mean": None if contexts is None else pack(contexts.mean_act[start:stop]),
            "histogram": None if contexts is None else pack(contexts.histogram[start:stop]),
            "effects": {kind: _effects(run, kind, pieces, shown, start, stop) for kind in run.effects},
            "labels": [labels[feature] for feature in range(start, stop)],
            "controls": [controls[feature] for feature in range(start, stop)],
            "neighbors": None if measures is None else pack(measures.neighbor_indices[start:stop].astype(np.int32)),
            "cosines": None if measures is None else pack(measures.neighbor_cosines[start:stop].astype(np.float32)),
        }


def _contexts(block: ContextBlock, shown: ContextPieces, start: int, stop: int) -> dict[str, JSONValue]:
    first, last = int(block.offsets[start]), int(block.offsets[stop])
    position = block.position[first:last]
    places = np.searchsorted(shown.rows, block.row[first:last])
    window = block.window[first:last]
    return {
        "offsets": pack((block.offsets[start : stop + 1] - first).astype(np.uint32)),
        "place": pack(places.astype(np.uint32)),
        "document": pack(shown.documents[places, position].astype(np.int32)),
        "position": pack(position.astype(np.uint16 if shown.context_len <= 0xFFFF else np.uint32)),
        "act": pack(block.act[first:last]),
        "window": pack(window),
        "pieces": pack(shown.windows(places, position, window.shape[1])),
        "stratum": None if block.stratum is None else pack(block.stratum[first:last].astype(np.uint8)),
    }


def _effects(
    run: RunSource, kind: EffectKind, pieces: Pieces, shown: ContextPieces, start: int, stop: int
) -> dict[str, JSONValue]:
    effects = run.effects[kind]
    here = np.flatnonzero((effects.features >= start) & (effects.features < stop))
    return {
        "features": pack((effects.features[here] - start).astype(np.uint32)),
        "promoted": pack(pieces.of_tokens(effects.promoted_ids[here]).astype(shown.dtype)),
        "promoted_values": pack(effects.promoted_values[here].astype(np.float32)),
        "suppressed": pack(pieces.of_tokens(effects.suppressed_ids[here]).astype(shown.dtype)),
        "suppressed_values": pack(effects.suppressed_values[here].astype(np.float32)),
    }


def _labels_by_feature(run: RunSource, pieces: Pieces) -> defaultdict[int, list[JSONValue]]:
    scores: defaultdict[tuple[int, str], list[JSONValue]] = defaultdict(list)
    for (feature, labeler, _), score in sorted(run.scores.items()):
        scores[feature, labeler].append(score_figures(score))
    order = {labeler: n for n, labeler in enumerate(run.labelers)}
    result: defaultdict[int, list[JSONValue]] = defaultdict(list)
    for key, label in sorted(run.labels.items(), key=lambda item: (item[0][0], order[item[0][1]])):
        result[label.feature].append(_label(label, scores.pop(key, []), pieces))
    for feature, labeler in scores:
        # A score whose label is gone would otherwise vanish from the page.
        result[feature].append({"labeler": labeler, "status": "missing", "scores": scores[feature, labeler]})
    return result


def _label(label: Label, scores: list[JSONValue], pieces: Pieces) -> dict[str, JSONValue]:
    texts = ("label", "description", "fires_on", "promotes", "suppresses", "model", "prompt_version", "reason")
    result: dict[str, JSONValue] = {"labeler": label.labeler, "status": label.status, "scores": scores}
    result |= {name: getattr(label, name) for name in texts if getattr(label, name)}
    if label.rule_tokens:
        result["rule"] = pieces.of_tokens(np.asarray(label.rule_tokens)).tolist()
    for name in ("confidence", "cost", "selection_score"):
        if getattr(label, name) is not None:
            result[name] = finite(getattr(label, name))
    if label.num_candidates is not None:
        result["num_candidates"] = label.num_candidates
    return result
