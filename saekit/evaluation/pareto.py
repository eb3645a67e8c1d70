"""Which SAEs of a run no other one beats: FVU and cross-entropy recovered against L0, as table, CSV and JSON."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from saekit.evaluation.record import Evaluation
from saekit.manifest import atomic_write, write_json

__all__ = ["PARETO_NAME", "ParetoRow", "SAEFigures", "figures_of", "pareto_rows", "write_pareto"]

PARETO_NAME = "pareto"


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEFigures:
    """What one SAE costs and gives, on held-out tokens."""

    name: str
    """Of the SAE."""
    place: str
    """What it reconstructs; SAEs of different places are not compared."""
    l0: float | None
    """Active features a token."""
    fvu: float | None
    """Fraction of variance unexplained."""
    ce_recovered: float | None
    """Cross-entropy recovered, against zeros in the activations' place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParetoRow:
    """An SAE and whether it is on the fronts of its place."""

    figures: SAEFigures
    """Of the SAE."""
    is_on_fvu_front: bool
    """Whether no SAE with at most its L0 has a lower FVU, and none with its FVU a lower L0."""
    is_on_ce_front: bool
    """The same of the cross-entropy recovered, the more the better."""


def figures_of(name: str, place: str, evaluation: Evaluation) -> SAEFigures:
    """Returns the figures of an evaluated SAE; None where one was not measured."""
    metrics = next(row.metrics for row in evaluation.rows if row.name == "sae")
    l0, fvu, ce = (metrics[key].value if key in metrics else None for key in ("l0", "fvu", "ce_recovered_zero"))
    return SAEFigures(name=name, place=place, l0=l0, fvu=fvu, ce_recovered=ce)


def pareto_rows(found: Sequence[SAEFigures]) -> list[ParetoRow]:
    """Returns the SAEs by place and rising L0, with the fronts they are on; equal ones are on it together."""
    by_fvu = _front(found, lambda one: one.fvu)
    by_ce = _front(found, lambda one: None if one.ce_recovered is None else -one.ce_recovered)
    order = sorted(found, key=lambda one: (one.place, one.l0 is None, one.l0 or 0.0, one.name))
    return [
        ParetoRow(figures=one, is_on_fvu_front=one.name in by_fvu, is_on_ce_front=one.name in by_ce) for one in order
    ]


def write_pareto(folder: Path, rows: Sequence[ParetoRow]) -> None:
    """Writes `pareto.json`, `pareto.csv` and `pareto.md`.

    Raises:
        ResourceError: the folder cannot be written.
    """
    values = [asdict(row.figures) | {"fvu_front": row.is_on_fvu_front, "ce_front": row.is_on_ce_front} for row in rows]
    write_json(folder / f"{PARETO_NAME}.json", values)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    for suffix, content in (("csv", text.getvalue()), ("md", _markdown(rows))):
        with atomic_write(folder / f"{PARETO_NAME}.{suffix}") as file:
            file.write(content.encode())


def _front(found: Sequence[SAEFigures], cost: Callable[[SAEFigures], float | None]) -> set[str]:
    """Returns the names of those that no other of their place beats in L0 or cost without losing in the other."""
    points = [(one.name, one.place, one.l0, value) for one in found if (value := cost(one)) is not None]
    known = [(name, place, l0, value) for name, place, l0, value in points if l0 is not None]
    return {
        name
        for name, place, l0, value in known
        if not any(other == place and a <= l0 and b <= value and (a < l0 or b < value) for _, other, a, b in known)
    }


def _markdown(rows: Sequence[ParetoRow]) -> str:
    lines = ["| SAE | of | L0 | FVU | CE recovered | on the front of |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        one = row.figures
        numbers = [
            "-" if value is None else f"{value:.{digits}f}"
            for value, digits in ((one.l0, 2), (one.fvu, 4), (one.ce_recovered, 4))
        ]
        fronts = [name for name, is_on in (("FVU", row.is_on_fvu_front), ("CE", row.is_on_ce_front)) if is_on]
        lines.append(f"| {one.name} | {one.place} | {' | '.join(numbers)} | {', '.join(fronts) or '-'} |")
    return "\n".join(lines) + "\n"
