"""scripts/bench_checkpoint: a row a checkpoint, each read back, and nothing left behind."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_checkpoint"


def test_every_checkpoint_is_a_row_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "--gigabytes", "0.001", "--rounds", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows] == ["1", "2"]
    for row in rows:
        waited, cpu, whole, share = (float(cell) for cell in row.strip("| ").split("|")[2:])
        assert 0 <= waited <= whole
        assert 0 <= share <= 1
        assert cpu >= 0
    assert not list(tmp_path.iterdir())
