"""How good a dictionary is: reconstruction, model loss, null rows, decoder structure, each with intervals."""

from saekit.evaluation.pareto import ParetoRow, SAEFigures, figures_of, pareto_rows, write_pareto
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
    "ParetoRow",
    "SAEFigures",
    "evaluate",
    "figures_of",
    "pareto_rows",
    "read_evaluation",
    "sae_fingerprint",
    "summary_table",
    "write_pareto",
]
