"""All scores of a run in a few lines: means over features with intervals, beside the same of labels that know nothing."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from saekit.labelling.records import Score

__all__ = ["FIGURES", "is_scored", "summarise_scores", "summary_lines"]

FIGURES = (
    *("f1", "auprc", "f1_natural", "auprc_natural", "balanced_accuracy", "accuracy"),
    *("pearson", "pearson_natural", "r2", "gain", "specificity_near", "f1_near", "auprc_near"),
)
"""In the order of a report."""
RATES = ("base_rate", "natural_rate")
NUM_BOOTSTRAP = 1000

Summary = dict[str, object]


def summarise_scores(
    scores: Sequence[Score], controls: Sequence[Score], *, seed: int = 0, has_rules: bool = False
) -> list[Summary]:
    """Returns one entry for each scorer and labeler, in order, the controls of a scorer after its labelers.

    An entry has `scorer`, `labeler`, `judge`, the number of features `scored` and of those `without_figures` (too few pieces, or no
    usable answer), means over features of every figure, each with the 95 % interval over resampled features, the mean base rate
    and natural rate, and the number of pieces that got no usable verdict. Where predicted activations were all the same, the
    correlation is not defined; such features are not in its mean, and `pearson_undefined` counts them.

    Args:
        has_rules: whether scores of token rules are among them, which have controls of their own.
    """
    groups: defaultdict[tuple[str, str, str | None], list[Score]] = defaultdict(list)
    for is_control, records in ((False, scores), (True, controls)):
        for score in records:
            if has_rules or score.scorer != "rule":
                groups[score.scorer, ("~" if is_control else "") + score.labeler, score.judge].append(score)
    return [
        _entry(scorer, labeler.removeprefix("~"), judge, groups[scorer, labeler, judge], seed)
        for scorer, labeler, judge in sorted(groups, key=lambda key: (key[0], key[1], key[2] or ""))
    ]


def is_scored(score: Score) -> bool:
    """Returns whether a score has figures."""
    return bool(score.right) or score.f1 is not None


def _entry(scorer: str, labeler: str, judge: str | None, scores: Sequence[Score], seed: int) -> Summary:
    judged = [score for score in scores if is_scored(score)]
    entry: Summary = {
        "scorer": scorer,
        "labeler": labeler,
        "judge": judge,
        "scored": len(judged),
        "without_figures": len(scores) - len(judged),
        "unparsed": sum(score.num_unparsed for score in scores),
    }
    for name in RATES:
        values = [value for score in judged if (value := getattr(score, name)) is not None]
        entry[name] = float(np.mean(values)) if values else None
    for name in FIGURES:
        values = [value for score in judged if (value := getattr(score, name)) is not None]
        if values:
            entry[name] = float(np.mean(values))
            entry[f"{name}_interval"] = _interval(values, seed)
    if scorer == "simulation":
        entry["pearson_undefined"] = sum(score.pearson is None for score in judged)
    return entry


def _interval(values: Sequence[float], seed: int) -> list[float]:
    drawn = np.random.default_rng(seed).integers(len(values), size=(NUM_BOOTSTRAP, len(values)))
    return [float(end) for end in np.quantile(np.asarray(values)[drawn].mean(axis=1), (0.025, 0.975))]


def summary_lines(entries: Sequence[Summary]) -> list[str]:
    """Returns the entries as a reader should see them while a run ends."""
    lines = []
    for entry in entries:
        main = next((name for name in ("pearson", "f1", "accuracy") if name in entry), None)
        if main is None:
            continue
        low, high = np.asarray(entry[f"{main}_interval"], dtype=np.float64)
        parts = [f"{main} {entry[main]:.2f} [{low:.2f}, {high:.2f}]"]
        parts += [
            f"{title} {entry[name]:.2g}"
            for name, title in (
                ("r2", "explained variance"),
                ("gain", "nats per token"),
                ("auprc", "AUPRC"),
                ("base_rate", "of base rate"),
                ("auprc_natural", "natural AUPRC"),
                ("natural_rate", "of base rate"),
                ("auprc_near", "AUPRC against near negatives"),
            )
            if entry.get(name) is not None
        ]
        if entry.get("pearson_undefined"):
            parts.append(f"correlation undefined for {entry['pearson_undefined']}")
        lines.append(f"{entry['scorer']}, {entry['labeler']}: {', '.join(parts)} over {entry['scored']} features")
    return lines
