"""Two sets of labels on the same held-out pieces: is one better, and by how much?"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saekit.errors import ConfigError
from saekit.labelling.records import Score
from saekit.labelling.store import read_scores

__all__ = ["LabelComparison", "compare_labels", "compare_scores", "mcnemar"]

NUM_BOOTSTRAP = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelComparison:
    """One scorer's view of labels A and B of the same features."""

    scorer: str
    labeler_a: str
    labeler_b: str
    judge: str | None
    num_features: int
    """Features that both were scored on."""
    f1_a: float
    f1_b: float
    """Means over these features; of `output` and `intervention`, which have no F1, the accuracy."""
    difference: float
    """Mean of B's F1 minus A's."""
    low: float
    """Lower end of its 95 % interval over resampled features."""
    high: float
    num_pieces: int
    """Pieces of text that both were judged on; 0 for `rule` and `embedding`, which judge none, and for different pieces."""
    only_a: int
    """Of these, judged rightly by A's label alone."""
    only_b: int
    p_value: float | None
    """McNemar's exact test that neither is right more often; None without common pieces. Pieces of one feature are not
    independent, which it does not know: the interval does."""

    def __str__(self) -> str:
        pieces = (
            f"; of {self.num_pieces:,} pieces {self.only_a:,} right by A alone, {self.only_b:,} by B alone, McNemar p = "
            f"{self.p_value:.2g}"
            if self.p_value is not None
            else ""
        )
        return (
            f"{self.scorer}: {self.labeler_a} {self.f1_a:.3f}, {self.labeler_b} {self.f1_b:.3f}, difference "
            f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}] over {self.num_features:,} features{pieces}"
        )


def compare_labels(
    a: str | Path, b: str | Path, *, labeler: str | None = None, other: str | None = None, seed: int = 0
) -> list[LabelComparison]:
    """Returns how the labels in folder `b` compare with those in folder `a`, by each scorer that has seen both.

    Args:
        a: a label folder.
        b: a label folder, the same one to compare two of its labelers.
        labeler: whose labels in `a`; None: each labeler that is in both.
        other: whose labels in `b`; None: the same as in `a`.
        seed: of the resampled features.

    Raises:
        ConfigError: a folder without scores, or no scorer has seen a feature with labels of both.
        StoreError: a line of a folder's scores is no score.
    """
    first, second = read_scores(a), read_scores(b)
    for folder, scores in ((a, first), (b, second)):
        if not scores:
            raise ConfigError(
                f"compare-labels: {str(folder)!r}: no scores in it, needs a folder that 'saekit label' has written"
            )
    if labeler is None and other is not None:
        raise ConfigError(f"compare-labels: labeler {other!r} of B, needs one of A too")
    names = [labeler] if labeler is not None else sorted({s.labeler for s in first} & {s.labeler for s in second})
    if labeler is None and Path(a).resolve() == Path(b).resolve():
        raise ConfigError(f"compare-labels: A and B are both {str(a)!r}, needs two labelers of it")
    found = [
        comparison
        for name in names
        for comparison in compare_scores(
            [score for score in first if score.labeler == name],
            [score for score in second if score.labeler == (other or name)],
            seed=seed,
        )
    ]
    if not found:
        there = [", ".join(sorted({score.labeler for score in scores})) or "none" for scores in (first, second)]
        raise ConfigError(
            f"compare-labels: no feature that one scorer has scored in both; labelers with scores: {there[0]} in A, "
            f"{there[1]} in B"
        )
    return found


def figure(score: Score) -> float | None:
    """Returns what scores of one scorer are compared by: F1, or the accuracy of a scorer that has none."""
    return score.accuracy if score.f1 is None else score.f1


def compare_scores(a: Sequence[Score], b: Sequence[Score], *, seed: int = 0) -> list[LabelComparison]:
    """Returns one comparison for each scorer and judge, over the features with a figure in both; `a`, `b`: of one labeler each."""
    keyed = [
        {(score.scorer, score.judge, score.feature): score for score in scores if figure(score) is not None}
        for scores in (a, b)
    ]
    pairs: defaultdict[tuple[str, str | None], list[tuple[Score, Score]]] = defaultdict(list)
    for key in sorted(keyed[0].keys() & keyed[1].keys(), key=lambda key: (key[0], key[1] or "", key[2])):
        pairs[key[0], key[1]].append((keyed[0][key], keyed[1][key]))
    return [_compared(scorer, judge, own, seed) for (scorer, judge), own in pairs.items()]


def _compared(scorer: str, judge: str | None, pairs: Sequence[tuple[Score, Score]], seed: int) -> LabelComparison:
    f1 = np.array([(figure(one), figure(two)) for one, two in pairs], dtype=np.float64)
    difference = f1[:, 1] - f1[:, 0]
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(NUM_BOOTSTRAP, len(pairs)))
    low, high = np.quantile(difference[drawn].mean(axis=1), (0.025, 0.975))
    same = [(one, two) for one, two in pairs if one.right and one.pieces == two.pieces]
    right = np.array([(x, y) for one, two in same for x, y in zip(one.right, two.right, strict=True)], dtype=bool)
    right = right.reshape(-1, 2)
    only_a, only_b = int((right[:, 0] & ~right[:, 1]).sum()), int((~right[:, 0] & right[:, 1]).sum())
    return LabelComparison(
        scorer=scorer,
        labeler_a=pairs[0][0].labeler,
        labeler_b=pairs[0][1].labeler,
        judge=judge,
        num_features=len(pairs),
        f1_a=float(f1[:, 0].mean()),
        f1_b=float(f1[:, 1].mean()),
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        num_pieces=len(right),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b) if len(right) else None,
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Returns the two-sided exact p-value of pairs in which just one of two was right.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12 (1947); exact
    form: the binomial test with share 1/2 on the discordant pairs.
    """
    total, least = only_a + only_b, min(only_a, only_b)
    # In whole numbers, as the parts of a large total are too small for a float.
    ways = tail = 1
    for hits in range(least):
        ways = ways * (total - hits) // (hits + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**total))
