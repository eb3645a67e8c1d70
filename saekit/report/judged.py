"""What the page shows of labelling beside the labels: judges' figures next to controls, what became of every feature, money.

Nothing here names a scorer: whatever stands in scores.jsonl and in the report of the label stage is shown.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import cast

from saekit.labelling.records import Score
from saekit.labelling.scoring.controls import NO_LABEL
from saekit.labelling.scoring.summary import summarise_scores
from saekit.report.payload import JSONValue, finite
from saekit.report.sources import RunSource

__all__ = ["controls_by_feature", "describe_judged", "describe_outcome", "score_figures"]

ALWAYS = ("f1", "low", "high", "auprc", "precision", "recall", "balanced_accuracy", "base_rate")
"""Figures that stand in the page's data even where they are missing."""
NAMES = ("scorer", "judge", "prompt_version")


def score_figures(score: Score) -> dict[str, JSONValue]:
    """Returns every number of a score, under its own name; those that few scorers have only where they are there."""
    values = {name: getattr(score, name) for name in type(score).model_fields}
    numbers = {
        name: finite(value) if isinstance(value, float) else value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "feature"
    }
    names = {name: str(values[name]) for name in NAMES if values[name] is not None}
    return {**dict.fromkeys(ALWAYS), **names, **numbers}


def controls_by_feature(run: RunSource) -> defaultdict[int, list[JSONValue]]:
    """Returns, for each feature, the scores of what stood in its label's place."""
    found: defaultdict[int, list[JSONValue]] = defaultdict(list)
    for score in sorted(run.controls, key=lambda score: (score.feature, score.scorer, score.labeler)):
        found[score.feature].append({"labeler": score.labeler, **score_figures(score)})
    return found


def describe_judged(run: RunSource) -> JSONValue:
    """Returns the means of every scorer and labeler with their intervals, a scorer's controls after its labelers."""
    return [
        {
            **{
                name: finite(value) if isinstance(value, float) else cast(JSONValue, value)
                for name, value in entry.items()
            },
            "is_control": str(entry["labeler"]).startswith("control:") and entry["labeler"] != NO_LABEL,
        }
        for entry in summarise_scores(list(run.scores.values()), run.controls)
    ]


def describe_outcome(run: RunSource) -> JSONValue:
    """Returns how many features each labeler labelled, failed and skipped, with the reasons, and what the model took."""
    labelers = run.outcome.get("labelers")
    if not isinstance(labelers, Mapping):
        return None
    counts = ("labelled", "failed", "skipped", "missing", "failed_reasons", "skipped_features")
    return {
        "labelers": [
            {"name": str(name), **{key: cast(JSONValue, entry.get(key)) for key in counts}}
            for name, entry in labelers.items()
        ],
        "llm": cast(JSONValue, run.outcome.get("llm")),
    }
