"""Finds, for every feature at once, the token rule that best predicts its firings on the training documents.

Shapes: F features, L table places, n sampled places, P firings that speak for their features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

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
MIN_SHAPE_LIFT = 1.5
"""The same for predicates, which hold on many tokens."""
MAX_TOKENS = 16
"""Different words in one rule."""
SLACK = 0.01
"""Weighted F1 given up for a shorter list."""


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
    strength: NDArray[np.float64]
    """Each firing's share of its feature's sum of squared activations [P]."""

    @property
    def base_rate(self) -> NDArray[np.float64]:
        """Share of sampled tokens on which each feature fires [F]."""
        return self.total / max(len(self.sample), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One rule of one kind for one feature."""

    fit: float
    """F1 on the training documents, each firing weighted by its share of the feature's squared activations.

    Unweighted, the many faint firings of a feature would drown the few that carry what it writes into the stream.
    """
    size: int
    """Number of clauses."""
    build: Callable[[], tuple[Clause, ...]]
    """Makes the rule's clauses, the strongest first: few of all candidates are ever asked."""


class _Measured(NamedTuple):
    precision: float
    recall: float
    strength: float


ClauseMaker = Callable[[int, _Measured], Clause]
Place = Literal["current", "previous", "next", "pair"]


def gather_evidence(contexts: FeatureContexts, codes: CodeSample, table: TokenTable) -> Evidence:
    """Returns each feature's firings: those on the sampled rows, or its contexts where these are too few.

    `table` holds the sampled rows and the contexts' rows (see `rows_needed`).
    """
    num_features = contexts.num_features
    sampled = np.bincount(codes.indices, minlength=num_features)
    rare = sampled < np.minimum(MIN_SAMPLED_FIRINGS, contexts.firing_count)
    keep = ~rare[codes.indices]
    context_features, context_flat, context_acts = _context_peaks(contexts, np.flatnonzero(rare), table.context_len)
    features = np.concatenate([codes.indices[keep].astype(np.int64), context_features])
    flat = np.concatenate([codes.tokens[codes.owners()[keep]], context_flat])
    acts = np.concatenate([codes.acts[keep], context_acts])
    order = np.argsort(features, kind="stable")
    features, flat, squares = features[order], flat[order], acts[order].astype(np.float64) ** 2
    peaks = np.bincount(context_features, minlength=num_features)
    total = np.where(rare, contexts.density * codes.num_tokens, sampled)
    energy = np.bincount(features, weights=squares, minlength=num_features)
    return Evidence(
        table=table,
        sample=table.places(codes.tokens),
        features=features,
        places=table.places(flat),
        weight=np.where(rare, total / np.maximum(peaks, 1), 1.0),
        total=total.astype(np.float64),
        strength=squares / np.maximum(energy[features], np.finfo(np.float64).tiny),
    )


def rows_needed(contexts: FeatureContexts, codes: CodeSample, context_len: int) -> NDArray[np.int64]:
    """Returns the rows that `gather_evidence` will look at."""
    sampled = np.bincount(codes.indices, minlength=contexts.num_features)
    rare = np.flatnonzero(sampled < np.minimum(MIN_SAMPLED_FIRINGS, contexts.firing_count))
    _, flat, _ = _context_peaks(contexts, rare, context_len)
    return np.unique(np.concatenate([codes.tokens, flat]) // context_len)


def _context_peaks(
    contexts: FeatureContexts, features: NDArray[np.int64], context_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Returns (feature, flat index, activation) of every peak of some features' contexts, each once."""
    row = np.concatenate([contexts.top_row[features], contexts.sample_row[features]], axis=1).astype(np.int64)
    position = np.concatenate([contexts.top_position[features], contexts.sample_position[features]], axis=1)
    acts = np.concatenate([contexts.top_act[features], contexts.sample_act[features]], axis=1)
    which, slot = np.nonzero(row >= 0)
    key = np.stack([features[which], row[which, slot] * context_len + position[which, slot]], axis=1)
    unique, first = np.unique(key, axis=0, return_index=True)
    return unique[:, 0], unique[:, 1], acts[which, slot][first]


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

    def clause(place: Place, expand: Callable[[int], tuple[int, ...]]) -> ClauseMaker:
        return lambda value, measured: Clause(place=place, tokens=expand(value), **measured._asdict())

    def pair_clause(value: int, measured: _Measured) -> Clause:
        first, second = divmod(value, vocabulary_size)
        return Clause(place="pair", previous=members(first), tokens=members(second), **measured._asdict())

    return {
        "word": _token_sets(evidence, current, clause("current", members)),
        "token": _token_sets(evidence, table.ids.astype(np.int64), clause("current", lambda token: (token,))),
        "previous": _token_sets(evidence, previous, clause("previous", members)),
        "next": _token_sets(evidence, following, clause("next", members)),
        "pair": _token_sets(evidence, pair, pair_clause),
        "shape": _shapes(evidence),
        "always": _always(evidence),
    }


def _token_sets(evidence: Evidence, values: NDArray[np.int64], make: ClauseMaker) -> list[Candidate | None]:
    """Returns the best union of values of one attribute of a token; `values` [L], -1 where a token has none.

    A token has one value, so the union of the largest weighted F1 is a prefix of the values in order of weighted precision.
    """
    known, compact = np.unique(values, return_inverse=True)
    feature, value, count, strength = _sum_pairs(evidence, compact, known)
    occurrences = np.bincount(compact[evidence.sample], minlength=len(known)).astype(np.float64)
    seen = np.maximum(occurrences[value], count)
    base = evidence.base_rate[feature]
    precision = (count + SMOOTHING * base) / (seen + SMOOTHING)
    # Two firings at least, unless the feature has hardly more: one coincidence is no rule.
    enough = (count >= 2) | (evidence.total[feature] < 8)
    keep = enough & (precision >= MIN_LIFT * base)
    feature, value = feature[keep], value[keep]
    count, seen, precision, strength = (array[keep] for array in (count, seen, precision, strength))
    # Shrunk like the count, and set against the tokens on which the feature stays silent.
    weighted = strength * evidence.total[feature] * np.minimum(precision * seen / np.maximum(count, 1e-12), 1)
    silent = (1 - precision) * seen
    gain = weighted / (weighted + silent)

    order = np.lexsort((value, -weighted, feature))
    order = order[_rank(feature[order]) < 4 * MAX_TOKENS]
    order = order[np.lexsort((value[order], -gain[order], feature[order]))]
    order = order[_rank(feature[order]) < MAX_TOKENS]
    owner = feature[order]
    hits = _running(weighted[order], owner)
    fit = 2 * hits / (hits + _running(silent[order], owner) + evidence.total[owner])

    def clauses(chosen: NDArray[np.int64]) -> tuple[Clause, ...]:
        by_strength = chosen[np.argsort(-strength[chosen], kind="stable")]
        return tuple(
            make(
                int(known[value[i]]),
                _Measured(
                    precision=float(precision[i]),
                    recall=float(min(1.0, count[i] / evidence.total[feature[i]])),
                    strength=float(strength[i]),
                ),
            )
            for i in by_strength
        )

    result: list[Candidate | None] = [None] * len(evidence.total)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    for start, stop in zip(starts.tolist(), np.append(starts, len(owner))[1:].tolist(), strict=True):
        run = fit[start:stop]
        length = int(np.flatnonzero(run >= run.max() - SLACK)[0]) + 1
        chosen = order[start : start + length]
        result[int(owner[start])] = Candidate(fit=float(run[length - 1]), size=length, build=partial(clauses, chosen))
    return result


def _sum_pairs(
    evidence: Evidence, compact: NDArray[np.int64], known: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Returns (feature, compact value, weighted firings, share of strength) for every pair that occurs."""
    at = compact[evidence.places]
    key = evidence.features * len(known) + at
    has_value = known[at] >= 0
    key, strength = key[has_value], evidence.strength[has_value]
    order = np.argsort(key)
    key = key[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    feature, value = np.divmod(key[starts], len(known))
    times = np.diff(starts, append=len(key))
    sums = np.add.reduceat(strength[order], starts) if len(starts) else np.empty(0)
    return feature, value, times * evidence.weight[feature], sums


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
    """Returns the best single predicate of each feature."""
    num_features, names = len(evidence.total), list(SHAPES)
    fit, precision, recall, strength = (np.zeros((len(names), num_features)) for _ in range(4))
    for row, name in enumerate(names):
        holds = evidence.table.shape(name)
        seen = max(float(holds[evidence.sample].sum()), 1.0)
        at = holds[evidence.places]
        firings = np.bincount(evidence.features[at], minlength=num_features) * evidence.weight
        count = np.minimum(firings, seen)
        strength[row] = np.bincount(evidence.features[at], weights=evidence.strength[at], minlength=num_features)
        precision[row] = (count + SMOOTHING * evidence.base_rate) / (seen + SMOOTHING)
        recall[row] = np.divide(count, evidence.total, out=np.zeros(num_features), where=evidence.total > 0)
        weighted = strength[row] * evidence.total
        worth = 2 * weighted / np.maximum(weighted + (1 - precision[row]) * seen + evidence.total, 1e-12)
        fit[row] = np.where(precision[row] >= MIN_SHAPE_LIFT * evidence.base_rate, worth, 0)

    def clauses(row: int, feature: int) -> tuple[Clause, ...]:
        place = (row, feature)
        measured = _Measured(
            precision=float(precision[place]), recall=float(recall[place]), strength=min(1.0, float(strength[place]))
        )
        return (Clause(place="shape", shape=names[row], **measured._asdict()),)

    return [
        Candidate(fit=float(fit[row, feature]), size=1, build=partial(clauses, row, feature))
        if fit[row, feature] > 0
        else None
        for feature, row in enumerate(fit.argmax(axis=0).tolist())
    ]


def _always(evidence: Evidence) -> list[Candidate | None]:
    """Returns the rule that the feature fires on every token."""

    def clauses(rate: float) -> tuple[Clause, ...]:
        return (Clause(place="always", precision=rate, recall=1.0, strength=1.0),)

    return [
        Candidate(fit=2 * rate / (1 + rate), size=1, build=partial(clauses, rate)) if rate > 0 else None
        for rate in evidence.base_rate.tolist()
    ]
