"""How good a dictionary is: reconstruction, model loss, null rows, decoder structure, each with intervals."""

from saekit.evaluation.record import (
    Evaluation,
    EvaluationRow,
    EvaluationTable,
    FeatureMeasures,
    Figure,
    Histogram,
    read_evaluation,
    summary_table,
)
from saekit.evaluation.stage import EvaluationConfig, evaluate, sae_fingerprint

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "EvaluationRow",
    "EvaluationTable",
    "FeatureMeasures",
    "Figure",
    "Histogram",
    "evaluate",
    "read_evaluation",
    "sae_fingerprint",
    "summary_table",
]
