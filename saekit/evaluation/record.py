"""The artifact of the evaluate stage: one JSON of figures with intervals, one safetensors of per-feature arrays."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, InstanceOf, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from saekit.config import Config
from saekit.errors import FormatError
from saekit.evaluation.definitions import METRICS, metric_at, metric_info
from saekit.manifest import atomic_write, manifest_sha256, write_json

__all__ = [
    "EVALUATION_NAME",
    "FEATURES_NAME",
    "Evaluation",
    "EvaluationRow",
    "EvaluationTable",
    "FeatureMeasures",
    "Figure",
    "Histogram",
    "read_evaluation",
    "summary_table",
    "write_evaluation",
]

EVALUATION_NAME = "evaluation.json"
FEATURES_NAME = "features.safetensors"


class Figure(Config):
    """A number with its 95 % interval; None stands for what is not defined or was not measured."""

    value: float | None = Field(default=None, allow_inf_nan=False)
    """The figure on all evaluated tokens."""
    low: float | None = Field(default=None, allow_inf_nan=False)
    """Lower end of the interval."""
    high: float | None = Field(default=None, allow_inf_nan=False)
    """Upper end of the interval."""

    @classmethod
    def of(cls, value: float, low: float = math.nan, high: float = math.nan) -> Self:
        """Returns the figure with NaN and Inf turned into None."""
        value, low, high = (float(number) for number in (value, low, high))
        return cls(
            value=value if math.isfinite(value) else None,
            low=low if math.isfinite(low) else None,
            high=high if math.isfinite(high) else None,
        )

    def format(self, digits: int = 4) -> str:
        """Returns `0.1234 [0.1200, 0.1260]`, without brackets where there is no interval, `-` where there is no value."""
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


class Histogram(Config):
    """Counts between edges; one edge more than counts."""

    edges: tuple[float, ...] = ()
    """Ascending edges; a bin holds its left edge, the last one both."""
    counts: tuple[int, ...] = ()
    """Number of features in each bin."""


class EvaluationRow(Config):
    """One dictionary of the table: the SAE, or a null."""

    name: str
    """sae, mean, pca or random."""
    title: str
    """What the row is, for people: `PCA, 32 components`."""
    metrics: dict[str, Figure]
    """Metric -> figure; every metric is there, undefined ones with the value None. Of several hook points these are the means,
    beside `<metric>@<hook point>`."""
    difference: dict[str, Figure] = Field(default_factory=dict)
    """Metric -> the SAE's value minus this row's, paired over documents; empty in the SAE's own row."""


class EvaluationTable(NamedTuple):
    """A table ready to be printed: one line a metric, one column a dictionary."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureMeasures:
    """Per-feature arrays (F features)."""

    density: npt.NDArray[np.float32]
    """Share of the evaluated tokens on which the feature fires, `[F]`."""
    decoder_max_cosine: npt.NDArray[np.float32]
    """Largest cosine with another feature's decoder row, `[F]`."""
    neighbor_indices: npt.NDArray[np.int32]
    """The nearest features by decoder cosine, nearest first, `[F, 8]`; -1 where there are fewer."""
    neighbor_cosines: npt.NDArray[np.float32]
    """Their cosines, `[F, 8]`; 0 where there are fewer."""


class Evaluation(Config):
    """What an evaluation found."""

    hook_point: str
    """Where the evaluated activations were taken, for a transcoder those that it predicts; several separated by commas."""
    rows: tuple[EvaluationRow, ...]
    """The SAE first, then the null rows."""
    reference: dict[str, float | None] = Field(default_factory=dict)
    """ce_clean, ce_zero, ce_mean, kl_zero, kl_mean in nats; None without a language model."""
    num_tokens: int
    """Tokens of the reconstruction figures."""
    num_documents: int
    """Documents that they come from: the units of the bootstrap."""
    num_loss_tokens: int
    """Positions of the CE and KL figures."""
    num_massive: int
    """Massive tokens behind `fvu_massive`."""
    num_bootstrap: int
    """Resamples behind each interval."""
    density: Histogram
    """log10 firing density of the features that fire."""
    decoder_cosine: Histogram
    """Largest decoder cosine of each feature with any other."""
    definitions: dict[str, str]
    """Name -> one-line definition of everything above."""
    features: InstanceOf[FeatureMeasures] | None = Field(default=None, exclude=True, repr=False)
    """Per-feature arrays; kept in a file of their own."""

    def row(self, name: str = "sae") -> EvaluationRow:
        """Returns the row of that name.

        Raises:
            KeyError: no such row, e.g. `pca` where no training tokens were given.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def value(self, metric: str, *, row: str = "sae") -> float | None:
        """Returns one figure's value."""
        return self.row(row).metrics[metric].value

    @property
    def fvu(self) -> float | None:
        """Fraction of variance unexplained by the SAE."""
        return self.value("fvu")

    @property
    def l0(self) -> float | None:
        """Mean active features a token of the SAE."""
        return self.value("l0")

    @property
    def dead_fraction(self) -> float | None:
        """Share of the SAE's features that fire on no evaluated token."""
        return self.value("dead_fraction")

    def metric_names(self) -> list[str]:
        """Returns the metrics that any row has, in the order of the tables; those of one hook point below those of all."""
        sites = self.hook_point.split(",")
        names = [name for bare in METRICS for name in (bare, *(metric_at(bare, site) for site in sites))]
        return [name for name in names if any(name in row.metrics for row in self.rows)]

    def table(self, *, metrics: Sequence[str] | None = None) -> EvaluationTable:
        """Returns metrics down, dictionaries across; metrics that no row has are left out."""
        names = self.metric_names() if metrics is None else metrics
        shown = [name for name in names if any(row.metrics[name].value is not None for row in self.rows)]
        return EvaluationTable(
            header=["metric", *(row.title for row in self.rows)],
            rows=[
                [info.title, *(row.metrics[name].format(info.digits) for row in self.rows)]
                for name, info in ((name, metric_info(name)) for name in shown)
            ],
        )

    def to_markdown(self) -> str:
        """Returns the table as GitHub Markdown, with what it was measured on below."""
        table = self.table()
        lines = [table.header, ["---", *["---:"] * len(self.rows)], *table.rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return (
            f"{text}\n{self.num_tokens:,} held-out tokens of {self.num_documents:,} documents at `{self.hook_point}`"
            f" ({self.num_massive:,} massive tokens apart), CE and KL on {self.num_loss_tokens:,} positions;"
            f" 95 % intervals over {self.num_bootstrap:,} resamples of the documents.\n"
        )


def summary_table(evaluations: Mapping[str, Evaluation]) -> EvaluationTable:
    """Returns one line for each SAE and, below it, each of its nulls, with the few figures that are looked at first.

    Args:
        evaluations: name -> evaluation.
    """
    lines = [
        [name if row.name == "sae" else f"{name}: {row.title}", *(_plain(row, metric) for metric in _SUMMARY)]
        for name, evaluation in evaluations.items()
        for row in evaluation.rows
    ]
    return EvaluationTable(header=["dictionary", *(METRICS[metric].title for metric in _SUMMARY)], rows=lines)


_SUMMARY = ("fvu", "l0", "dead_fraction", "delta_ce", "ce_recovered_zero")


def _plain(row: EvaluationRow, metric: str) -> str:
    value = row.metrics[metric].value
    return "-" if value is None else f"{value:.{METRICS[metric].digits}f}"


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Writes both files atomically; the JSON last, so that where it is, everything is."""
    if evaluation.features is not None:
        arrays = {field.name: getattr(evaluation.features, field.name) for field in fields(FeatureMeasures)}
        with atomic_write(folder / FEATURES_NAME) as file:
            file.write(save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    write_json(folder / EVALUATION_NAME, evaluation.to_dict())


def read_evaluation(folder: str | Path) -> Evaluation:
    """Returns the evaluation in a finished stage's folder.

    Raises:
        StoreError: no manifest, or the stage has not finished.
        FormatError: a file is missing or does not hold what it should.
    """
    folder = Path(folder)
    manifest_sha256(folder)
    try:
        values = json.loads((folder / EVALUATION_NAME).read_bytes())
        arrays = load_arrays((folder / FEATURES_NAME).read_bytes())
        features = FeatureMeasures(**{field.name: arrays[field.name] for field in fields(FeatureMeasures)})
        return Evaluation.model_validate(values | {"features": features})
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise FormatError(
            f"{str(folder)!r}: not a readable evaluation ({first}); remove it and evaluate again"
        ) from error
