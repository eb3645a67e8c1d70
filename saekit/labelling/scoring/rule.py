"""Does a label's own token rule predict, token by token, when its feature fires on documents that nobody has read?

Shapes: n held-out tokens, M labels, C documents, B bootstrap draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from saekit.activations import StoreView
from saekit.config import Config
from saekit.labelling.collect import draw_rows, encoded_rows
from saekit.labelling.records import Label, Score
from saekit.labelling.rules import Rule, TokenIndex
from saekit.labelling.tokentable import TokenTable
from saekit.labelling.vocabulary import Vocabulary
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE

__all__ = ["HeldOut", "RuleScores", "RuleScoringConfig", "score_rules"]

CHUNK = 512
"""Labels whose per-document counts are held at a time."""


class RuleScoringConfig(Config):
    """How label rules are checked."""

    max_tokens: int = Field(default=262_144, ge=1)
    """Held-out tokens looked at: all of them up to here, else whole rows drawn at random. Always at the natural rate."""
    num_bootstrap: int = Field(default=200, ge=2)
    """Resamples of the documents behind each interval."""
    seed: int = Field(default=0, ge=0)
    """Of the drawn rows, the resamples and the shuffled control."""


class HeldOut:
    """The held-out tokens and every feature's firings on them.

    Attributes:
        view: the documents, also those that were not drawn.
        table: the tokens' rows.
        in_view: which places of the table are held out and scored, bool [L].
        num_tokens: n.
        document_of: number of each held-out place's document, 0 .. C - 1 [L]; without meaning at other places.
        num_documents: C.
        fingerprint: names the documents and the rows that were drawn of them.
    """

    def __init__(
        self,
        sae: SAE,
        view: StoreView,
        vocabulary: Vocabulary,
        *,
        config: RuleScoringConfig,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        """Encodes the tokens once; a feature fires where its activation is above zero."""
        self.view = view
        self.fingerprint = f"{view.fingerprint} {config.max_tokens} {config.seed}"
        rows = np.flatnonzero(draw_rows(view, num_tokens=config.max_tokens, seed=config.seed))
        self.table = TokenTable(view.store, rows, vocabulary)
        self.in_view: NDArray[np.bool_] = np.asarray(view.mask[rows]).reshape(-1)
        self.num_tokens = int(self.in_view.sum())
        features, places, values = [], [], []
        with progress.task("held-out activations", self.num_tokens, "tokens") as task:
            for flat, acts, indices in encoded_rows(sae, view, rows):
                token, slot = np.nonzero(acts > 0)
                features.append(indices[token, slot])
                places.append(self.table.places(flat)[token])
                values.append(acts[token, slot])
                task.advance(len(flat))
        feature, place = np.concatenate(features), np.concatenate(places)
        order = np.lexsort((place, feature))
        self._places = place[order]
        self._acts = np.concatenate(values)[order].astype(np.float32, copy=False)
        self._starts = np.searchsorted(feature[order], np.arange(sae.cfg.d_sae + 1))
        # Documents of the same rows that are not held out must not be drawn into a resample.
        documents = np.unique(self.table.documents[self.in_view])
        self.document_of = np.searchsorted(documents, self.table.documents)
        self.num_documents = len(documents)

    def firings(self, feature: int) -> NDArray[np.int64]:
        """Returns the places where a feature fires, ascending."""
        return self._places[self._starts[feature] : self._starts[feature + 1]]

    def activations(self, feature: int) -> NDArray[np.float32]:
        """Returns a feature's activations at the places of `firings`."""
        return self._acts[self._starts[feature] : self._starts[feature + 1]]

    def largest(self) -> NDArray[np.float32]:
        """Returns each feature's largest activation, 0 where it never fires [F]."""
        found = np.zeros(len(self._starts) - 1, dtype=np.float32)
        np.maximum.at(found, np.repeat(np.arange(len(found)), np.diff(self._starts)), self._acts)
        return found

    def acts_on(self, feature: int, start: int, stop: int) -> NDArray[np.float32]:
        """Returns a feature's activations on the places from `start` to before `stop` [stop - start]."""
        acts = np.zeros(stop - start, dtype=np.float32)
        places = self.firings(feature)
        low, high = np.searchsorted(places, (start, stop))
        acts[places[low:high] - start] = self.activations(feature)[low:high]
        return acts


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleScores:
    """Scores of all labels with a rule, and what worthless labels score on the same tokens."""

    scores: list[Score]
    controls: dict[str, float | int]
    """Means over the features that fire: `f1`, `auprc`, the same of `shuffled_` labels (each label on another feature),
    of an `empty_` label (predicts nothing) and of one that says `always_`."""


def score_rules(
    held_out: HeldOut, labels: Sequence[Label], *, config: RuleScoringConfig, progress: Progress = NO_PROGRESS
) -> RuleScores:
    """Scores every label that carries a rule against the held-out tokens.

    F1, precision and recall are those of "any clause holds" against "activation above zero"; `auprc` is the average precision
    of the rule's graded score, ties in one step, tokens without a score last, so that an empty rule gets the base rate.
    The interval of F1 resamples whole documents.

    Args:
        labels: those without a rule or that failed are passed over.

    Raises:
        ConfigError: a label's rule cannot be read.
    """
    ruled = [label for label in labels if label.rule is not None and label.status == "done"]
    index = TokenIndex(held_out.table)
    generator = np.random.default_rng(config.seed)
    documents = held_out.num_documents
    draws = generator.multinomial(documents, np.full(documents, 1 / documents), size=config.num_bootstrap)
    rules = [Rule.parse(label.rule or {}, where=f"rule of feature {label.feature}") for label in ruled]
    scores: list[Score] = []
    shuffled: list[tuple[float, float]] = []
    # Scoring rule i on feature i + shift meets a wrong feature for each label, the same one on every run.
    shift = int(generator.integers(1, max(2, len(ruled))))
    with progress.task("rule scores", len(ruled), "labels") as task:
        for start in range(0, len(ruled), CHUNK):
            chunk = ruled[start : start + CHUNK]
            counts = np.zeros((3, len(chunk), documents), dtype=np.float32)
            found = []
            for row, label in enumerate(chunk):
                places, graded = _predictions(held_out, index, rules[start + row])
                found.append(_compare(held_out, places, graded, label.feature, counts[:, row]))
                other = ruled[(start + row + shift) % len(ruled)].feature
                if other != label.feature and len(held_out.firings(other)):
                    wrong = _compare(held_out, places, graded, other, None)
                    shuffled.append((wrong.f1, wrong.auprc))
            low, high = _intervals(counts, draws.astype(np.float32))
            scores += [
                _score(label, one, held_out.num_tokens, float(low[row]), float(high[row]))
                for row, (label, one) in enumerate(zip(chunk, found, strict=True))
            ]
            task.advance(len(chunk))
    return RuleScores(scores=scores, controls=_controls(scores, shuffled, held_out))


@dataclass(frozen=True, slots=True)
class _Match:
    hits: int
    predicted: int
    positives: int
    auprc: float

    @property
    def f1(self) -> float:
        return 2 * self.hits / max(self.predicted + self.positives, 1)


def _predictions(held_out: HeldOut, index: TokenIndex, rule: Rule) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    places, graded = index.scores(rule)
    inside = held_out.in_view[places]
    return places[inside], graded[inside]


def _compare(
    held_out: HeldOut,
    places: NDArray[np.int64],
    graded: NDArray[np.float64],
    feature: int,
    counts: NDArray[np.float32] | None,
) -> _Match:
    """Compares a rule's places with a feature's firings; fills `counts` [3, C] with hits, predictions, firings per document."""
    firings = held_out.firings(feature)
    hit = np.isin(places, firings, assume_unique=True)
    if counts is not None:
        for row, at in enumerate((places[hit], places, firings)):
            counts[row] = np.bincount(held_out.document_of[at], minlength=held_out.num_documents)
    auprc = average_precision(graded, hit, num_positive=len(firings), num_tokens=held_out.num_tokens)
    return _Match(int(hit.sum()), len(places), len(firings), auprc)


def average_precision(
    graded: NDArray[np.float64], hit: NDArray[np.bool_], *, num_positive: int, num_tokens: int
) -> float:
    """Returns sum over distinct scores of (recall gained) * (precision there); unscored tokens form the last step.

    Args:
        graded: scores of the predicted tokens [p].
        hit: which of them are positives [p].
        num_positive: positives among all tokens.
        num_tokens: all tokens.
    """
    if num_positive == 0:
        return 0.0
    order = np.argsort(-graded, kind="stable")
    graded, hit = graded[order], hit[order]
    last_of_step = np.append(np.diff(graded) != 0, True) if len(graded) else np.empty(0, dtype=bool)
    hits = np.append(np.cumsum(hit)[last_of_step], num_positive)
    taken = np.append((np.arange(len(graded)) + 1)[last_of_step], num_tokens)
    gained = np.diff(hits, prepend=0)
    return float((gained / num_positive * (hits / taken)).sum())


def _intervals(
    counts: NDArray[np.float32], draws: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the 2.5 % and 97.5 % quantiles of F1 over resampled documents [m] each; NaN where no draw has a firing."""
    hits, predicted, positives = (np.asarray(draws @ part.T, dtype=np.float64) for part in counts)  # [B, m]
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(positives > 0, 2 * hits / (predicted + positives), np.nan)
    low, high = np.full(f1.shape[1], np.nan), np.full(f1.shape[1], np.nan)
    defined = ~np.isnan(f1).all(axis=0)
    if defined.any():
        low[defined], high[defined] = np.nanquantile(f1[:, defined], (0.025, 0.975), axis=0)
    return low, high


def _score(label: Label, match: _Match, num_tokens: int, low: float, high: float) -> Score:
    fires = match.positives > 0
    negatives = num_tokens - match.positives
    recall = match.hits / match.positives if fires else None
    specificity = 1 - (match.predicted - match.hits) / negatives if negatives else None
    balanced = (recall + specificity) / 2 if recall is not None and specificity is not None else None
    return Score(
        feature=label.feature,
        labeler=label.labeler,
        scorer="rule",
        f1=_rounded(match.f1 if fires else None),
        auprc=_rounded(match.auprc if fires else None),
        precision=_rounded(match.hits / match.predicted if match.predicted else None),
        recall=_rounded(recall),
        balanced_accuracy=_rounded(balanced),
        base_rate=match.positives / num_tokens if num_tokens else None,
        num_positive=match.positives,
        num_negative=negatives,
        low=_rounded(low if fires and not np.isnan(low) else None),
        high=_rounded(high if fires and not np.isnan(high) else None),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _controls(
    scores: Sequence[Score], shuffled: Sequence[tuple[float, float]], held_out: HeldOut
) -> dict[str, float | int]:
    fires = [score for score in scores if score.num_positive > 0]
    rates = [score.base_rate or 0.0 for score in fires]
    wrong = np.array(shuffled).reshape(-1, 2)

    def mean(values: Sequence[float]) -> float:
        return round(float(np.mean(values)), 6) if len(values) else 0.0

    return {
        "tokens": held_out.num_tokens,
        "documents": held_out.num_documents,
        "labels": len(scores),
        "labels_of_firing_features": len(fires),
        "f1": mean([score.f1 or 0.0 for score in fires]),
        "auprc": mean([score.auprc or 0.0 for score in fires]),
        "shuffled_f1": mean(wrong[:, 0].tolist()),
        "shuffled_auprc": mean(wrong[:, 1].tolist()),
        "empty_f1": 0.0,
        "empty_auprc": mean(rates),
        "always_f1": mean([2 * rate / (1 + rate) for rate in rates]),
        "always_auprc": mean(rates),
    }
