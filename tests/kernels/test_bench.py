"""The bench runs, checks before it times, and stops on a wrong result."""

import json
from pathlib import Path

import pytest
import torch
from bench import gpu, parts, run
from saekit_kernels import _candidates, _cpu, encode
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


def test_parts_are_checked_timed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "parts.md"
    assert parts.main(["--device", "cpu", "--shape", "odd", "--rounds", "2", "--out", str(file)]) == 0
    written = file.read_text()
    assert "| encoder matmul alone |" in written
    assert "| 1.00 | - |" in written
    assert "- fixed order of sums: " in written
    assert "- int8: 40 candidates a token prove " in written
    assert "Not measured: `scripts/bench_gpu` writes `gpu.md`." in written


def test_parts_stop_where_candidates_select_other_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = _candidates.topk
    monkeypatch.setattr(
        encode, "topk_of_candidates", lambda *operands: (right(*operands)[0] * 1.01, right(*operands)[1])
    )
    with pytest.raises(SystemExit, match=r"odd, int8: values differ by 1\.0e-02, needs at most 1e-05"):
        parts.main(["--device", "cpu", "--shape", "odd", "--out", str(tmp_path / "parts.md")])
    assert not (tmp_path / "parts.md").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_gpu_bench_says_in_one_line_that_it_needs_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.md")]) == 2
    assert capsys.readouterr().err == "scripts/bench_gpu: torch finds no CUDA device, needs one\n"
    assert not (tmp_path / "gpu.md").exists()
