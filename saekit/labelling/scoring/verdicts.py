"""A judge's yes and no: read from its answer, and turned into figures at both rates with their intervals.

Shapes: n pieces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from saekit.labelling.answers import UnusableAnswerError, parse_object, whole_number
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.pieces import Piece

__all__ = ["Judged", "at_rate", "f1_interval", "listed_answers", "read_answers", "score_answers", "wilson", "with_near"]

NUM_BOOTSTRAP = 200
NORMAL_95 = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What goes into a score beside the verdicts."""

    scorer: ScorerName = "detection"
    judge: str | None = None
    """Name of the judging model."""
    prompt_version: str | None = None
    natural_rate: float | None = None
    """Share of positives in held-out text as it comes."""
    indices: tuple[int, ...] = ()
    """Store index of each piece's first token."""
    seed: int = 0


def listed_answers(text: str, num: int, *, key: str) -> dict[int, list[JsonValue]]:
    """Returns item (from 0) -> what an answer's list says of it under `key`; items out of range are left out."""
    try:
        listed = parse_object(text, needs="answers")["answers"]
    except UnusableAnswerError:
        return {}
    found: dict[int, list[JsonValue]] = {}
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict):
            number = whole_number(entry.get("id"))
            if number is not None and 1 <= number <= num:
                found.setdefault(number - 1, []).append(entry.get(key))
    return found


def read_answers(text: str, num_pieces: int) -> dict[int, bool]:
    """Returns piece (from 0) -> verdict; pieces with no verdict, or two different ones, are left out."""
    said = {
        piece: {verdict for value in values if (verdict := _verdict(value)) is not None}
        for piece, values in listed_answers(text, num_pieces, key="active").items()
    }
    return {piece: verdicts.pop() for piece, verdicts in said.items() if len(verdicts) == 1}


def _verdict(value: JsonValue) -> bool | None:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words.get(str(value).strip().casefold())


def score_answers(label: Label, pieces: Sequence[Piece], answers: Mapping[int, bool], judged: Judged) -> Score:
    """Returns precision, recall, F1 with its interval over documents, average precision, and both at the natural rate."""
    active = np.array([piece.is_active for piece in pieces], dtype=bool)
    # A piece that got no verdict is counted as judged wrongly.
    says = np.array([answers.get(i, not piece.is_active) for i, piece in enumerate(pieces)], dtype=bool)
    documents = np.array([piece.document for piece in pieces], dtype=np.int64)
    num_positive, num_negative = int(active.sum()), int((~active).sum())
    is_judged = num_positive > 0 and bool(answers)
    hits = int((active & says).sum())
    recall = hits / num_positive if num_positive else 0.0
    specificity = float((~says[~active]).mean()) if num_negative else 0.0
    low, high = f1_interval(active, says, documents, seed=judged.seed) if is_judged else (None, None)
    base_rate = num_positive / len(pieces) if pieces else None
    both = is_judged and num_negative > 0
    natural = judged.natural_rate
    return Score(
        feature=label.feature,
        labeler=label.labeler,
        scorer=judged.scorer,
        judge=judged.judge,
        prompt_version=judged.prompt_version,
        f1=2 * hits / (num_positive + int(says.sum())) if is_judged else None,
        auprc=at_rate(recall, 1 - specificity, base_rate)[1] if both and base_rate is not None else None,
        precision=hits / int(says.sum()) if is_judged and says.any() else None,
        recall=recall if is_judged else None,
        balanced_accuracy=(recall + specificity) / 2 if both else None,
        base_rate=base_rate,
        natural_rate=natural,
        f1_natural=at_rate(recall, 1 - specificity, natural)[0] if both and natural is not None else None,
        auprc_natural=at_rate(recall, 1 - specificity, natural)[1] if both and natural is not None else None,
        num_positive=num_positive,
        num_negative=num_negative,
        num_unparsed=len(pieces) - len(answers),
        low=low,
        high=high,
        pieces=judged.indices,
        right=tuple((active == says).tolist()) if is_judged else (),
    )


def with_near(score: Score, said: Sequence[bool | None]) -> Score:
    """Returns a score with the figures of near negatives.

    Args:
        said: what was said of each of them; None: no verdict, which counts as wrong.
    """
    if not said or score.recall is None:
        return score.model_copy(update={"num_near": len(said)})
    silent = sum(verdict is False for verdict in said)
    low, high = wilson(silent, len(said))
    f1, auprc = at_rate(score.recall, 1 - silent / len(said), 0.5)
    return score.model_copy(
        update={
            "num_near": len(said),
            "specificity_near": silent / len(said),
            "near_low": low,
            "near_high": high,
            "f1_near": f1,
            "auprc_near": auprc,
        }
    )


def at_rate(recall: float, false_alarms: float, rate: float) -> tuple[float, float]:
    """Returns F1 and average precision of yes-or-no verdicts where a share `rate` is positive.

    Average precision over two steps, those that got a yes and then the rest, as `average_precision` counts ties; a judge that
    knows nothing gets `rate`.

    Args:
        recall: share of positives that get a yes.
        false_alarms: share of negatives that get a yes.
        rate: share of positives, in [0, 1].
    """
    hits, said = rate * recall, rate * recall + (1 - rate) * false_alarms
    f1 = 2 * hits / (rate + said) if rate + said > 0 else 0.0
    precision = hits / said if said > 0 else 0.0
    return f1, precision * recall + (1 - recall) * rate


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of independent trials.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    share, z2 = hits / trials, NORMAL_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL_95 * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def f1_interval(
    active: NDArray[np.bool_], says: NDArray[np.bool_], documents: NDArray[np.int64], *, seed: int
) -> tuple[float | None, float | None]:
    """Returns the 95 % interval of F1 over resampled documents."""
    known, which = np.unique(documents, return_inverse=True)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(known), np.full(len(known), 1 / len(known)), size=NUM_BOOTSTRAP)[:, which]
    hits, positives, said = draws @ (active & says), draws @ active, draws @ says
    defined = positives > 0
    f1 = 2 * hits[defined] / (positives[defined] + said[defined])
    low, high = np.quantile(f1, (0.025, 0.975)) if len(f1) else (np.nan, np.nan)
    return (float(low), float(high)) if np.isfinite(low) else (None, None)
