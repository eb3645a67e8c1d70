"""Labels as one Parquet file, for notebooks and other programs."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saekit.labelling.evidence.sidescores import SideScores
from saekit.labelling.records import Label
from saekit.manifest import atomic_write

__all__ = ["LABEL_TABLE_NAME", "write_label_table"]

LABEL_TABLE_NAME = "labels.parquet"
SCHEMA_VERSION = "1"

_SCHEMA = pa.schema(
    [
        pa.field("feature", pa.int64(), nullable=False),
        pa.field("labeler", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("label", pa.string(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("fires_on", pa.string(), nullable=False),
        pa.field("promotes", pa.string(), nullable=False),
        pa.field("suppresses", pa.string(), nullable=False),
        pa.field("confidence", pa.float64()),
        pa.field("examples", pa.list_(pa.int64()), nullable=False),
        pa.field("rule_tokens", pa.list_(pa.int64()), nullable=False),
        pa.field("rule", pa.string()),
        pa.field("evidence", pa.string()),
        pa.field("prompt_version", pa.string()),
        pa.field("model", pa.string()),
        pa.field("input_tokens", pa.int64(), nullable=False),
        pa.field("output_tokens", pa.int64(), nullable=False),
        pa.field("cost", pa.float64()),
        pa.field("feature_cost", pa.float64()),
        pa.field("input_score", pa.float64()),
        pa.field("output_score", pa.float64()),
        pa.field("num_candidates", pa.int64()),
        pa.field("selection_scorer", pa.string()),
        pa.field("selection_score", pa.float64()),
    ],
    metadata={"saekit.labels": SCHEMA_VERSION},
)


def write_label_table(
    path: str | Path,
    labels: Iterable[Label],
    *,
    cost_of_features: Mapping[int, float],
    sides: SideScores | None = None,
) -> None:
    """Writes one row for each label, by feature and labeler; a later version only adds columns.

    The columns are the fields of `Label`, `rule` as JSON text, `feature_cost`: dollars of all that was asked about the feature so
    far, judgements included, and the `input_score` and `output_score` of the feature, null where not measured.

    Raises:
        ResourceError: the file cannot be written.
    """
    rows: list[dict[str, object]] = []
    for label in sorted(labels, key=lambda label: (label.feature, label.labeler)):
        row = label.to_dict()
        row["rule"] = None if label.rule is None else json.dumps(label.rule)
        row["feature_cost"] = cost_of_features.get(label.feature)
        row |= {} if sides is None else sides.of(label.feature)
        rows.append(row)
    with atomic_write(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
