"""The labeler that needs no language model: each feature's best token rule on the training documents, in words."""

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.examples import ExampleReader, feature_examples
from saekit.labelling.nearby import find_nearby
from saekit.labelling.records import LEXICAL, Label
from saekit.labelling.rules import Rule, TokenIndex
from saekit.labelling.search import Candidate, find_candidates, gather_evidence, rows_needed
from saekit.labelling.tokenrows import TokenRows
from saekit.labelling.tokentable import TokenTable
from saekit.labelling.vocabulary import Vocabulary
from saekit.labelling.wording import Wording, token_list

__all__ = ["LexicalLabeler"]

MIN_FIRINGS = 3
"""A feature that fires less often has shown no pattern."""
WEAK = 0.35
"""Below this fit a rule covers too little of a feature to stand as its label."""
NOTHING = 0.15
"""Below this fit its tokens are not even named."""
NEARBY_BELOW = 0.6
"""Words nearby are looked for where the best other rule reaches no more than this F1."""
SHOWN_EFFECTS = 8

_HANDICAP = {
    "word": 0.0,
    "token": 0.01,
    "shape": 0.02,
    "pair": 0.03,
    "previous": 0.02,
    "next": 0.05,
    "nearby": 0.03,
    "always": 0.05,
}
_HANDICAP_PER_CLAUSE = 0.004
"""Fit that a rule must be better by than a rule on a single word: between near-equals the easier to read wins."""


class LexicalLabeler:
    """Labels features by their token rules.

    All rules are searched when it is made, for all features together; `label` then words one of them.
    """

    def __init__(self, store: TokenRows, contexts: FeatureContexts, vocabulary: Vocabulary) -> None:
        codes = contexts.codes()
        table = TokenTable(store, rows_needed(contexts, codes, store.context_len), vocabulary)
        self._contexts = contexts
        self._vocabulary = vocabulary
        self._reader = ExampleReader(store, vocabulary)
        self._evidence = gather_evidence(contexts, codes, table)
        self._starts = np.searchsorted(self._evidence.features, np.arange(contexts.num_features + 1))
        self._best = _best_candidates(find_candidates(self._evidence))
        unclear = np.array(
            [f for f in contexts.firing() if (best := self._best[f]) is None or best.fit < NEARBY_BELOW], dtype=np.int64
        )
        nearby, self._near = find_nearby(self._evidence, TokenIndex(table), unclear)
        for feature, candidate in enumerate(nearby):
            best = self._best[feature]
            if candidate is not None and (best is None or candidate.fit - _HANDICAP["nearby"] > best.fit):
                self._best[feature] = candidate

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Fit of each feature's rule [F], see `Candidate.fit`; 0 without a rule."""
        return np.array([0.0 if candidate is None else candidate.fit for candidate in self._best])

    def label(self, feature: int, effects: TokenEffects | None = None) -> Label:
        """Returns a feature's label; `effects` give its output side."""
        firings = int(self._contexts.firing_count[feature])
        candidate = self._best[feature]
        promotes, suppresses = self._output_side(feature, effects)
        if firings == 0 or candidate is None:
            text = "never fires" if firings == 0 else "no token pattern"
            return Label(
                feature=feature,
                labeler=LEXICAL,
                label=text,
                description=_sentences(
                    f"{text.capitalize()} on {self._contexts.num_tokens:,} training tokens", promotes, suppresses
                ),
                promotes=promotes,
                suppresses=suppresses,
                rule=Rule().to_dict(),
                confidence=0.0,
            )
        low, high = self._starts[feature], self._starts[feature + 1]
        fired_on = self._evidence.table.ids[self._evidence.places[low:high]]
        wording = Wording(self._reader, feature_examples(self._reader, self._contexts, feature), fired_on)
        rule = Rule(clauses=candidate.build())
        fires_on = wording.fires_on(rule.clauses)
        label = wording.label(rule.clauses)
        if candidate.fit < WEAK or firings < MIN_FIRINGS:
            near = wording.near(self._near.get(feature, []))
            at_times = f"; at times {label}" if candidate.fit >= NOTHING else ""
            label = "no single-token pattern" + (f"; near: {near}" if near else at_times)
        share = self._contexts.density[feature]
        intro = f"Fires on {firings:,} training tokens ({share:.2%}): {fires_on}"
        examples = " | ".join(wording.excerpts(3))
        return Label(
            feature=feature,
            labeler=LEXICAL,
            label=label,
            description=_sentences(intro, promotes, suppresses) + f" Strongest: {examples}",
            fires_on=fires_on,
            promotes=promotes,
            suppresses=suppresses,
            rule_tokens=rule.tokens,
            rule=rule.to_dict(),
            confidence=round(candidate.fit, 4),
        )

    def _output_side(self, feature: int, effects: TokenEffects | None) -> tuple[str, str]:
        if effects is None:
            return "", ""
        promoted = [token for token, value in effects.promoted(feature) if value > 0]
        suppressed = [token for token, value in effects.suppressed(feature) if value < 0]
        return (
            token_list(self._vocabulary, promoted, num=SHOWN_EFFECTS),
            token_list(self._vocabulary, suppressed, num=SHOWN_EFFECTS),
        )


def _best_candidates(candidates: dict[str, list[Candidate | None]]) -> list[Candidate | None]:
    kinds = list(candidates)
    best: list[Candidate | None] = []
    for row in zip(*candidates.values(), strict=True):
        offered = [
            (c.fit - _HANDICAP[kind] - _HANDICAP_PER_CLAUSE * c.size, -rank, c)
            for rank, (kind, c) in enumerate(zip(kinds, row, strict=True))
            if c is not None
        ]
        best.append(max(offered, key=lambda entry: entry[:2])[2] if offered else None)
    return best


def _sentences(intro: str, promotes: str, suppresses: str) -> str:
    parts = [intro]
    if promotes:
        parts.append(f"Makes more likely: {promotes}")
    if suppresses:
        parts.append(f"Makes less likely: {suppresses}")
    return ". ".join(parts) + "."
