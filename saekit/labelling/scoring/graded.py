"""Graded scores of pieces turned into figures: average precision of the scores, and F1 of a bar that the other half chose.

Shapes: n pieces.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.records import Label, Score
from saekit.labelling.scoring.pieces import Piece
from saekit.labelling.scoring.verdicts import Judged, score_answers

__all__ = ["best_bar", "graded_precision", "score_graded"]


def score_graded(label: Label, pieces: Sequence[Piece], graded: Mapping[int, float], judged: Judged) -> Score:
    """Returns the figures of a label from scores that are higher where a piece is rather active.

    Average precision is that of the scores. For the verdicts behind F1, a piece is called active where its score is at least the
    bar that gives the best F1 on the other half of the pieces.

    Args:
        pieces: in random order, as they are halved by their places.
        graded: piece (from 0) -> its score, finite. A piece without one is counted as scored in the worst way.
    """
    known = {place: says for place, says in graded.items() if 0 <= place < len(pieces)}
    if not known:
        return score_answers(label, pieces, {}, judged)
    active = np.array([piece.is_active for piece in pieces], dtype=bool)
    low, high = min(known.values()) - 1.0, max(known.values()) + 1.0
    values = np.array(
        [known.get(i, low if is_active else high) for i, is_active in enumerate(active)], dtype=np.float64
    )
    half = np.arange(len(pieces)) % 2 == 0
    says = np.where(
        half, values >= best_bar(values[~half], active[~half]), values >= best_bar(values[half], active[half])
    )
    score = score_answers(label, pieces, {place: bool(says[place]) for place in known}, judged)
    if active.all() or not active.any():
        return score
    rate = judged.natural_rate
    precisions = {
        "auprc": graded_precision(values, active, float(active.mean())),
        "auprc_natural": None if rate is None else graded_precision(values, active, rate),
    }
    return score.model_copy(update=precisions)


def best_bar(graded: NDArray[np.float64], active: NDArray[np.bool_]) -> float:
    """Returns the score from which on "active" gives the best F1; infinity where nothing is active."""
    if not active.any():
        return float("inf")
    bars = np.unique(graded)
    says = graded[None, :] >= bars[:, None]
    f1 = 2 * (says & active).sum(axis=1) / (says.sum(axis=1) + active.sum())
    return float(bars[int(f1.argmax())])


def graded_precision(graded: NDArray[np.float64], active: NDArray[np.bool_], rate: float) -> float:
    """Returns the average precision of graded scores where a share `rate` is positive, equal scores in one step.

    Args:
        graded: scores [n].
        active: which are positives [n]; at least one, and one that is not.
        rate: share of positives that the two kinds are weighted to.
    """
    bars = np.unique(graded)[::-1]
    at_least = graded[None, :] >= bars[:, None]
    recall = (at_least & active).sum(axis=1) / active.sum()
    false_alarms = (at_least & ~active).sum(axis=1) / (~active).sum()
    said = rate * recall + (1 - rate) * false_alarms
    precision = np.divide(rate * recall, said, out=np.zeros(len(bars)), where=said > 0)
    return float((np.diff(recall, prepend=0.0) * precision).sum())
