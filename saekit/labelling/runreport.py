"""What became of every feature of a dictionary: labelled, failed and why, or skipped and why."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saekit.labelling.ledger import Ledger
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label
from saekit.manifest import write_json

__all__ = [
    "LABEL_REPORT_NAME",
    "LabelerReport",
    "counted_labels",
    "ledger_figures",
    "ranges",
    "report_labeler",
    "write_report",
]

LABEL_REPORT_NAME = "label_report.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelerReport:
    """One labeler and every feature of the dictionary."""

    labeler: str
    labelled: Sequence[int]
    failed: Mapping[int, str]
    """Feature -> why."""
    skipped: Mapping[str, Sequence[int]]
    """Why -> features."""
    missing: Sequence[int]
    """Features that are still to be asked about: the run was stopped."""

    def to_dict(self) -> dict[str, object]:
        """Returns counts first, then reasons."""
        counts: dict[str, object] = {
            "labelled": len(self.labelled),
            "failed": len(self.failed),
            "skipped": sum(len(features) for features in self.skipped.values()),
            "missing": len(self.missing),
        }
        reasons = Counter(self.failed.values())
        return counts | {
            "failed_reasons": dict(reasons.most_common()),
            "failed_features": {str(feature): reason for feature, reason in sorted(self.failed.items())},
            "skipped_features": {reason: ranges(features) for reason, features in self.skipped.items()},
            "missing_features": ranges(self.missing),
        }

    def __str__(self) -> str:
        parts = [f"{self.labeler}: {len(self.labelled):,} labelled"]
        if self.failed:
            reason, number = Counter(self.failed.values()).most_common(1)[0]
            parts.append(f"{len(self.failed):,} failed ({number:,}: {reason})")
        parts += [f"{len(features):,} skipped ({reason})" for reason, features in self.skipped.items()]
        parts += [f"{len(self.missing):,} still to do"] if self.missing else []
        return ", ".join(parts)


def report_labeler(
    labeler: str, labels: Iterable[Label], *, num_features: int, skipped: Mapping[int, str]
) -> LabelerReport:
    """Returns what became of features 0 to `num_features` - 1 with one labeler; each is in exactly one place.

    Args:
        skipped: feature -> why it was not asked about; a label that is there all the same goes first.
    """
    own = {label.feature: label for label in labels if label.labeler == labeler}
    by_reason: dict[str, list[int]] = defaultdict(list)
    missing: list[int] = []
    for feature in range(num_features):
        if feature not in own:
            (by_reason[skipped[feature]] if feature in skipped else missing).append(feature)
    return LabelerReport(
        labeler=labeler,
        labelled=sorted(feature for feature, label in own.items() if label.status == "done"),
        failed={feature: label.reason or "" for feature, label in own.items() if label.status == "failed"},
        skipped=dict(by_reason),
        missing=missing,
    )


def counted_labels(labels: Sequence[Label]) -> dict[str, object]:
    """Returns how many labels of each labeler are done and failed."""
    counts: dict[str, object] = {}
    for labeler in sorted({label.labeler for label in labels}):
        own = [label for label in labels if label.labeler == labeler]
        counts[labeler] = {
            "done": sum(label.status == "done" for label in own),
            "failed": sum(label.status == "failed" for label in own),
        }
    return counts


def ledger_figures(ledger: Ledger, config: LLMConfig) -> dict[str, object]:
    """Returns what the labelling model was asked and what it took, all runs of the folder together."""
    has_prices = config.prices is not None
    features = ledger.cost_of_features()
    total = ledger.answered.cost + ledger.wasted.cost
    return {
        "model": config.model,
        "requests_sent": ledger.num_sent,
        "answers": ledger.answered.requests,
        "input_tokens": ledger.answered.input,
        "output_tokens": ledger.answered.output,
        "wasted_tokens": ledger.wasted.input + ledger.wasted.output,
        "interrupted_requests": ledger.lost.requests,
        "cost": total if has_prices else None,
        "interrupted_cost_at_most": config.cost(ledger.lost.input, ledger.lost.output),
        "cost_per_feature": total / len(features) if has_prices and features else None,
    }


def write_report(
    path: str | Path,
    labelers: Sequence[LabelerReport],
    *,
    num_features: int,
    llm: Mapping[str, object] | None,
    scores: Sequence[Mapping[str, object]] = (),
) -> None:
    """Writes the report as JSON."""
    write_json(
        path,
        {
            "features": num_features,
            "labelers": {report.labeler: report.to_dict() for report in labelers},
            "scores": [dict(entry) for entry in scores],
            "llm": None if llm is None else dict(llm),
        },
    )


def ranges(numbers: Iterable[int]) -> str:
    """Returns ascending numbers with runs drawn together: `0-4, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
