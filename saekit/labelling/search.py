"""Finds, for every feature at once, the token rule that best predicts its firings on the training documents.

Shapes: F features, L table places, n sampled places, P firings that speak for their features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.contexts import CodeSample, FeatureContexts
from saekit.labelling.rules import Clause
from saekit.labelling.shapes import SHAPES
from saekit.labelling.tokentable import TokenTable

__all__ = ["Candidate", "Evidence", "find_candidates", "gather_evidence"]

MIN_SAMPLED_FIRINGS = 20
"""Below so many firings on the sampled rows, a feature's contexts speak for it instead."""
SMOOTHING = 2.0
"""Tokens at the base rate added to each count, so that a token seen once proves little."""
MIN_LIFT = 3.0
"""A token belongs to a rule only if the feature fires on it this many times more often than on any token."""
MAX_TOKENS = 8
"""Different words in one rule: what a reader takes in."""
SLACK = 0.02
"""F1 given up for a shorter list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The firings rules are fitted to, and the sample they are weighed against."""

    table: TokenTable
    sample: NDArray[np.int64]
    """Places of the sampled tokens [n]."""
    features: NDArray[np.int64]
    """Feature of each firing [P], ascending."""
    places: NDArray[np.int64]
    """Its place in the table [P]."""
    weight: NDArray[np.float64]
    """How many sampled firings one of the feature's firings stands for [F]; 1 where all are sampled ones."""
    total: NDArray[np.float64]
    """Firings of each feature on the sample, expected where they were not sampled [F]."""

    @property
    def base_rate(self) -> NDArray[np.float64]:
        """Share of sampled tokens on which each feature fires [F]."""
        return self.total / max(len(self.sample), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One rule of one kind for one feature, with its smoothed F1 on the training documents."""

    f1: float
    clauses: tuple[Clause, ...]


Place = Literal["current", "previous", "next", "pair"]


def gather_evidence(contexts: FeatureContexts, codes: CodeSample, table: TokenTable) -> Evidence:
    """Returns each feature's firings: those on the sampled rows, or its contexts where these are too few.

    `table` holds the sampled rows and the contexts' rows (see `rows_needed`).
    """
    num_features = contexts.num_features
    sampled = np.bincount(codes.indices, minlength=num_features)
    rare = sampled < np.minimum(MIN_SAMPLED_FIRINGS, contexts.firing_count)
    keep = ~rare[codes.indices]
    features = [codes.indices[keep].astype(np.int64)]
    flat = [codes.tokens[codes.owners()[keep]]]
    context_features, context_flat = _context_peaks(contexts, np.flatnonzero(rare), table.context_len)
    features, flat = [*features, context_features], [*flat, context_flat]
    all_features, all_flat = np.concatenate(features), np.concatenate(flat)
    order = np.argsort(all_features, kind="stable")
    peaks = np.bincount(context_features, minlength=num_features)
    total = np.where(rare, contexts.density * codes.num_tokens, sampled)
    return Evidence(
        table=table,
        sample=table.places(codes.tokens),
        features=all_features[order],
        places=table.places(all_flat[order]),
        weight=np.where(rare, total / np.maximum(peaks, 1), 1.0),
        total=total.astype(np.float64),
    )


def rows_needed(contexts: FeatureContexts, codes: CodeSample, context_len: int) -> NDArray[np.int64]:
    """Returns the rows that `gather_evidence` will look at."""
    sampled = np.bincount(codes.indices, minlength=contexts.num_features)
    rare = np.flatnonzero(sampled < np.minimum(MIN_SAMPLED_FIRINGS, contexts.firing_count))
    _, flat = _context_peaks(contexts, rare, context_len)
    return np.unique(np.concatenate([codes.tokens, flat]) // context_len)


def _context_peaks(
    contexts: FeatureContexts, features: NDArray[np.int64], context_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    row = np.concatenate([contexts.top_row[features], contexts.sample_row[features]], axis=1).astype(np.int64)
    position = np.concatenate([contexts.top_position[features], contexts.sample_position[features]], axis=1)
    which, slot = np.nonzero(row >= 0)
    key = np.unique(np.stack([features[which], row[which, slot] * context_len + position[which, slot]], axis=1), axis=0)
    return key[:, 0], key[:, 1]


def find_candidates(evidence: Evidence) -> dict[str, list[Candidate | None]]:
    """Returns, for each kind of rule, the best candidate of each feature [F], None where nothing stands out."""
    table = evidence.table
    word_of = np.append(table.vocabulary.word_of, -1)
    vocabulary_size = len(word_of)

    def words(ids: NDArray[np.int32]) -> NDArray[np.int64]:
        known = np.where((ids >= 0) & (ids < vocabulary_size - 1), ids, vocabulary_size - 1)
        return word_of[known].astype(np.int64)

    members = table.vocabulary.tokens_of_word
    current, previous, following = words(table.ids), words(table.previous), words(table.next)
    pair = np.where((current >= 0) & (previous >= 0), previous * vocabulary_size + current, -1)

    def clause(place: Place, expand: Callable[[int], tuple[int, ...]]) -> Callable[[int, float, float], Clause]:
        return lambda value, precision, recall: Clause(
            place=place, tokens=expand(value), precision=precision, recall=recall
        )

    def pair_clause(value: int, precision: float, recall: float) -> Clause:
        first, second = divmod(value, vocabulary_size)
        return Clause(place="pair", previous=members(first), tokens=members(second), precision=precision, recall=recall)

    return {
        "word": _token_sets(evidence, current, clause("current", members)),
        "token": _token_sets(evidence, table.ids.astype(np.int64), clause("current", lambda token: (token,))),
        "previous": _token_sets(evidence, previous, clause("previous", members)),
        "next": _token_sets(evidence, following, clause("next", members)),
        "pair": _token_sets(evidence, pair, pair_clause),
        "shape": _shapes(evidence),
        "always": _always(evidence),
    }


def _token_sets(
    evidence: Evidence, values: NDArray[np.int64], make: Callable[[int, float, float], Clause]
) -> list[Candidate | None]:
    """Returns the best union of values of one attribute of a token; `values` [L], -1 where a token has none.

    A token has one value, so the union that maximises F1 is a prefix of the values sorted by precision.
    """
    num_features = len(evidence.total)
    known, compact = np.unique(values, return_inverse=True)
    feature, value, count = _count_pairs(evidence, compact, known)
    occurrences = np.bincount(compact[evidence.sample], minlength=len(known)).astype(np.float64)
    seen = np.maximum(occurrences[value], count)
    base = evidence.base_rate[feature]
    precision = (count + SMOOTHING * base) / (seen + SMOOTHING)
    # Two firings at least, unless the feature has hardly more: one coincidence is no rule.
    enough = (count >= 2) | (evidence.total[feature] < 8)
    keep = enough & (precision >= MIN_LIFT * base)
    feature, value, count, seen, precision = (array[keep] for array in (feature, value, count, seen, precision))

    order = np.lexsort((value, -count, feature))
    order = order[_rank(feature[order]) < 4 * MAX_TOKENS]
    order = order[np.lexsort((value[order], -precision[order], feature[order]))]
    order = order[_rank(feature[order]) < MAX_TOKENS]
    feature, value, seen, precision = feature[order], value[order], seen[order], precision[order]
    hits = precision * seen
    f1 = 2 * _running(hits, feature) / (_running(seen, feature) + evidence.total[feature])

    result: list[Candidate | None] = [None] * num_features
    starts = np.flatnonzero(np.diff(feature, prepend=-1))
    stops = np.append(starts[1:], len(feature))
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        run = f1[start:stop]
        length = int(np.flatnonzero(run >= run.max() - SLACK)[0]) + 1
        chosen = np.arange(start, start + length)
        total = evidence.total[feature[start]]
        clauses = [make(int(known[value[i]]), float(precision[i]), float(hits[i] / total)) for i in chosen]
        clauses.sort(key=lambda clause: -clause.recall)
        result[int(feature[start])] = Candidate(f1=float(run[length - 1]), clauses=tuple(clauses))
    return result


def _count_pairs(
    evidence: Evidence, compact: NDArray[np.int64], known: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Returns (feature, compact value, weighted firings) for every pair that occurs."""
    at = compact[evidence.places]
    has_value = known[at] >= 0
    key = evidence.features[has_value] * len(known) + at[has_value]
    unique, times = np.unique(key, return_counts=True)
    feature, value = np.divmod(unique, len(known))
    return feature, value, times * evidence.weight[feature]


def _rank(group: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def _running(amount: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the cumulative sum within runs of equal `group`."""
    total = np.cumsum(amount)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    before = total[starts] - amount[starts]
    return total - np.repeat(before, np.diff(starts, append=len(group)))


def _shapes(evidence: Evidence) -> list[Candidate | None]:
    num_features, names = len(evidence.total), list(SHAPES)
    f1 = np.zeros((len(names), num_features))
    precision = np.zeros_like(f1)
    recall = np.zeros_like(f1)
    for row, name in enumerate(names):
        holds = evidence.table.shape(name)
        seen = float(holds[evidence.sample].sum())
        firings = np.bincount(evidence.features[holds[evidence.places]], minlength=num_features) * evidence.weight
        count = np.minimum(firings, max(seen, 1.0))
        precision[row] = (count + SMOOTHING * evidence.base_rate) / (max(seen, 1.0) + SMOOTHING)
        recall[row] = np.divide(count, evidence.total, out=np.zeros(num_features), where=evidence.total > 0)
        hits = precision[row] * seen
        f1[row] = np.where(precision[row] >= 1.5 * evidence.base_rate, 2 * hits / (seen + evidence.total + 1e-12), 0)
    best = f1.argmax(axis=0)
    result: list[Candidate | None] = []
    for feature, row in enumerate(best.tolist()):
        if f1[row, feature] <= 0:
            result.append(None)
            continue
        clause = Clause(
            place="shape",
            shape=names[row],
            precision=float(precision[row, feature]),
            recall=float(recall[row, feature]),
        )
        result.append(Candidate(f1=float(f1[row, feature]), clauses=(clause,)))
    return result


def _always(evidence: Evidence) -> list[Candidate | None]:
    return [
        Candidate(f1=2 * rate / (1 + rate), clauses=(Clause(place="always", precision=rate, recall=1.0),))
        if rate > 0
        else None
        for rate in evidence.base_rate.tolist()
    ]
