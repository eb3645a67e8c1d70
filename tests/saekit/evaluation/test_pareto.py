"""Fronts of planted figures, place by place, and the files of them."""

import csv
import json
from pathlib import Path

from saekit.evaluation.pareto import SAEFigures, pareto_rows, write_pareto


def one(name: str, l0: float | None, fvu: float | None, ce: float | None, place: str = "h.1") -> SAEFigures:
    return SAEFigures(name=name, place=place, l0=l0, fvu=fvu, ce_recovered=ce)


FOUND = [
    one("beaten", 20.0, 0.40, 0.80),
    one("sparse", 10.0, 0.50, 0.70),
    one("middle", 20.0, 0.30, 0.85),
    one("twin", 20.0, 0.30, 0.85),
    one("dense", 40.0, 0.20, 0.84),
    one("elsewhere", 50.0, 0.60, 0.10, place="h.2"),
    one("unmeasured", 5.0, 0.90, None),
]


def test_those_that_no_other_beats_are_on_the_front() -> None:
    rows = pareto_rows(FOUND)
    assert {row.figures.name for row in rows if row.is_on_fvu_front} == {
        "unmeasured",
        "sparse",
        "middle",
        "twin",
        "dense",
        "elsewhere",
    }
    # Denser than the middle one, and no better by this figure.
    assert {row.figures.name for row in rows if row.is_on_ce_front} == {"sparse", "middle", "twin", "elsewhere"}
    assert [row.figures.name for row in rows][:2] == ["unmeasured", "sparse"]


def test_files_say_the_same(tmp_path: Path) -> None:
    write_pareto(tmp_path, pareto_rows(FOUND))
    values = json.loads((tmp_path / "pareto.json").read_text())
    assert values[1] == {
        "name": "sparse",
        "place": "h.1",
        "l0": 10.0,
        "fvu": 0.5,
        "ce_recovered": 0.7,
        "fvu_front": True,
        "ce_front": True,
    }
    with (tmp_path / "pareto.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [value["name"] for value in values]
    lines = (tmp_path / "pareto.md").read_text().splitlines()
    assert lines[2] == "| unmeasured | h.1 | 5.00 | 0.9000 | - | FVU |"
    assert "| beaten | h.1 | 20.00 | 0.4000 | 0.8000 | - |" in lines
