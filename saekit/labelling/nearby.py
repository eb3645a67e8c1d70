"""Words that stand near a feature's firings far more often than elsewhere: for features that follow a topic, not a token."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.rules import Clause, TokenIndex
from saekit.labelling.search import SMOOTHING, Candidate, Evidence
from saekit.labelling.tokentable import NEARBY

__all__ = ["find_nearby"]

MAX_FIRINGS = 100
"""Firings of one feature whose surroundings are read."""
MAX_WORDS = 6
MIN_SHARE = 0.2
"""A word must stand near this share of the firings."""
MAX_COVERAGE = 0.2
"""Words that stand near more of all tokens than this name no topic."""
MIN_LIFT = 3.0
MIN_LETTERS = 3


def find_nearby(
    evidence: Evidence, index: TokenIndex, features: NDArray[np.int64]
) -> tuple[list[Candidate | None], dict[int, list[int]]]:
    """Returns the best `nearby` rule of each feature [F] and, for all `features`, the words found near, most telling first.

    A word w is told from share r of the firings that have it within the 31 tokens before, and its share b of all tokens,
    by r log(r / b): what it adds to the divergence between the two.
    """
    num_features = len(evidence.total)
    candidates: list[Candidate | None] = [None] * num_features
    words: dict[int, list[int]] = {}
    firing, feature_of = _limited_firings(evidence, features)
    near_event, near_word = _words_before(evidence, firing)
    coverage = _coverage(evidence)
    is_content = np.array([len(text.strip()) >= MIN_LETTERS and text.strip().isalpha() for text in _texts(evidence)])
    keep = is_content[near_word] & (coverage[near_word] <= MAX_COVERAGE)
    near_event, near_word = near_event[keep], near_word[keep]

    num_events = np.bincount(feature_of, minlength=num_features)
    key, count = np.unique(feature_of[near_event] * len(coverage) + near_word, return_counts=True)
    feature, word = np.divmod(key, len(coverage))
    share = count / num_events[feature]
    telling = share * np.log(share / np.maximum(coverage[word], 1e-12))
    good = (count >= 3) & (share >= MIN_SHARE) & (share >= MIN_LIFT * coverage[word])
    feature, word, telling = feature[good], word[good], telling[good]
    order = np.lexsort((word, -telling, feature))
    feature, word = feature[order], word[order]
    in_sample = np.zeros(len(evidence.table), dtype=bool)
    in_sample[evidence.sample] = True
    event_start = np.searchsorted(near_event, np.arange(len(firing) + 1))
    first_event = np.searchsorted(feature_of, np.arange(num_features + 1))
    for value in np.unique(feature).tolist():
        chosen = word[np.searchsorted(feature, value) : np.searchsorted(feature, value, side="right")][
            :MAX_WORDS
        ].tolist()
        words[value] = chosen
        low, high = int(first_event[value]), int(first_event[value + 1])
        pairs = slice(int(event_start[low]), int(event_start[high]))
        events = [near_event[pairs][near_word[pairs] == w] - low for w in chosen]
        candidates[value] = _best_prefix(evidence, index, in_sample, value, chosen, events, high - low)
    return candidates, words


def _limited_firings(evidence: Evidence, features: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns (place, feature) of up to MAX_FIRINGS firings of each feature, spread evenly over its firings."""
    wanted = np.zeros(len(evidence.total), dtype=bool)
    wanted[features] = True
    at = np.flatnonzero(wanted[evidence.features])
    feature = evidence.features[at]
    starts = np.flatnonzero(np.diff(feature, prepend=-1))
    lengths = np.diff(starts, append=len(feature))
    rank = np.arange(len(feature)) - np.repeat(starts, lengths)
    size = np.repeat(lengths, lengths)
    # Rank r of n is kept where floor(r * m / n) steps up: m of n, evenly spaced.
    kept = (size <= MAX_FIRINGS) | (rank * MAX_FIRINGS // size != (rank - 1) * MAX_FIRINGS // size)
    return evidence.places[at[kept]], feature[kept]


def _texts(evidence: Evidence) -> list[str]:
    return evidence.table.vocabulary.texts


def _words(evidence: Evidence, ids: NDArray[np.int32]) -> NDArray[np.int64]:
    word_of = evidence.table.vocabulary.word_of
    return word_of[np.minimum(ids, len(word_of) - 1)].astype(np.int64)


def _words_before(evidence: Evidence, firing: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns (firing number, word) for every different word at or up to 31 tokens before each firing, sorted."""
    table = evidence.table
    num_words = len(table.vocabulary)
    keys = []
    # In slices, so that memory stays at some ten megabytes however many features there are.
    for start in range(0, len(firing), 65_536):
        places = firing[start : start + 65_536]
        reach = places[:, None] - np.arange(NEARBY)
        inside = reach >= table.segment_start[places][:, None]
        event = np.broadcast_to(np.arange(start, start + len(places))[:, None], reach.shape)
        key = np.sort(event[inside] * num_words + _words(evidence, table.ids[reach[inside]]))
        # Sorted by hand: np.unique hashes integers since numpy 2.3, which takes three times as long here.
        keys.append(key[np.diff(key, prepend=-1) > 0])
    merged = np.concatenate(keys) if keys else np.empty(0, dtype=np.int64)
    return np.divmod(merged, num_words)


def _coverage(evidence: Evidence) -> NDArray[np.float64]:
    """Returns, for every word, the share of all tokens that have it at or up to 31 tokens before [V]."""
    table = evidence.table
    words = _words(evidence, table.ids)
    order = np.lexsort((np.arange(len(words)), words))
    following = np.full(len(words), len(words), dtype=np.int64)
    same = words[order[1:]] == words[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    # A later mention of the same word takes over where it stands.
    end = np.minimum(np.minimum(table.segment_end + 1, np.arange(len(words)) + NEARBY), following)
    covered = np.bincount(
        words, weights=(end - np.arange(len(words))).astype(np.float64), minlength=len(table.vocabulary)
    )
    return covered / max(len(words), 1)


def _best_prefix(
    evidence: Evidence,
    index: TokenIndex,
    in_sample: NDArray[np.bool_],
    feature: int,
    words: list[int],
    events: list[NDArray[np.int64]],
    num_events: int,
) -> Candidate | None:
    """Returns the union of the first words with the best F1, with the measured precision of each word alone."""
    total = float(evidence.total[feature])
    covered = np.zeros(len(in_sample), dtype=bool)
    hit = np.zeros(num_events, dtype=bool)
    clauses: list[Clause] = []
    best: Candidate | None = None
    for word, at in zip(words, events, strict=True):
        tokens = evidence.table.vocabulary.tokens_of_word(word)
        places = index.nearby(tokens)
        places = places[in_sample[places]]
        covered[places] = True
        hit[at] = True
        recall = len(at) / num_events
        precision = min(1.0, recall * total / (max(len(places), recall * total) + SMOOTHING))
        clauses.append(Clause(place="nearby", tokens=tokens, precision=precision, recall=recall, strength=recall))
        hits = float(hit.mean()) * total
        predicted = max(float(covered.sum()), hits)
        # The same shrinkage as for single tokens: what was hardly seen proves little.
        hits *= predicted / (predicted + SMOOTHING)
        f1 = 2 * hits / (predicted + total)
        if best is None or f1 > best.fit:
            best = Candidate(fit=f1, size=len(clauses), build=partial(tuple, list(clauses)))
    return best
