"""The bench runs, checks before it times, and stops on a wrong result."""

import json
from pathlib import Path

import pytest
import torch
from bench import run
from saekit_kernels import _cpu
from torch import Tensor


def test_bench_writes_versions_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert run.main(["--device", "cpu", "--shape", "odd", "--rounds", "2", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["versions"]["torch"] == torch.__version__
    rows = {row["variant"]: row for row in written["figures"]}
    assert rows["encoder matmul alone"]["ratio_to_matmul"] == 1.0
    assert rows["top-k forward + backward"]["low_ms"] <= rows["top-k forward + backward"]["median_ms"]
    assert "correct: 6 shapes" in capsys.readouterr().out


def test_bench_times_nothing_when_a_result_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = _cpu.scatter_sum

    def off_by_little(*args: object, **kwargs: object) -> Tensor:
        return original(*args, **kwargs) * 1.001  # type: ignore[arg-type]

    monkeypatch.setenv("SAEKIT_KERNELS", "cpu")
    monkeypatch.setattr(_cpu, "scatter_sum", off_by_little)
    assert run.main(["--device", "cpu", "--shape", "odd"]) == 1
    captured = capsys.readouterr()
    assert "needs at most" in captured.err
    assert "ms" not in captured.out
