"""The quality benchmark without its peers: search for an L0, resuming, statistics, the check against the library's own figures."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit.sae import JumpReLUConfig, JumpReLUSAE, ReLUConfig, ReLUSAE, TopKConfig, TopKSAE
from scripts import bench_quality_runs
from scripts.bench_quality_data import Shape
from scripts.bench_quality_measure import measure
from scripts.bench_quality_runs import Results, Setting, Study, Workers, merit
from scripts.bench_quality_table import Interval, chosen_rows, difference, mean_interval, verdict, write_table

SHAPE = Shape(d_sae=32, k=4, batch=8, steps=2, test_tokens=64)


class FakeWorkers(Workers):
    """Libraries whose SAEs have an L0 of `constant / coefficient`, or the wanted one."""

    def __init__(self) -> None:
        super().__init__(lambda: Path("nowhere"), 1)
        self.jobs: list[tuple[str, dict[str, Any]]] = []

    def ask(self, library: str, job: dict[str, Any]) -> dict[str, Any]:
        self.jobs.append((library, job))
        return {"sae": job["out"], "seconds": 1.0, "fvu": 0.5, "l0": 4.0}

    def version(self, library: str) -> str:
        return "1.0"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Study, FakeWorkers]]:
    """A function: a study on the results so far, of libraries for which the second learning rate is the best."""

    def figures(folder: Path, data: Path, own: dict[str, float], *, k: int, **places: object) -> dict[str, Any]:
        job = workers[-1].jobs[-1][1]
        l0 = 4.0 if job["coefficient"] is None else 0.5 / job["coefficient"]
        fvu = 0.3 + abs(math.log(job["lr"] / 1e-2)) / 100 if job["lr"] else 0.2
        return {
            "raw_l0": l0,
            "raw_fvu": fvu,
            "l0": 4.0,
            "fvu": fvu + job["seed"] / 1000,
            "dead": 0.0,
            "errors": [fvu, fvu],
            "variances": [1.0, 1.0],
        }

    monkeypatch.setattr(bench_quality_runs, "measure", figures)
    workers: list[FakeWorkers] = []

    def make() -> tuple[Study, FakeWorkers]:
        workers.append(FakeWorkers())
        results = Results(tmp_path / "results.jsonl")
        made = Study("real", tmp_path, SHAPE, results, workers=workers[-1], num_rates=1, say=lambda _: None)
        return made, workers[-1]

    return make


def test_choose_goes_on_past_the_edge_to_the_learning_rate_with_the_least_fvu(
    study: Callable[[], tuple[Study, FakeWorkers]],
) -> None:
    made, workers = study()
    setting = made.choose("sae-lens", "topk")
    assert [job["lr"] for _, job in workers.jobs] == [pytest.approx(factor * 3e-4) for factor in (1, 3, 10, 30, 90)]
    assert setting == Setting(pytest.approx(9e-3), None)


def test_choose_searches_the_penalty_until_l0_is_near_at_three_learning_rates(
    study: Callable[[], tuple[Study, FakeWorkers]],
) -> None:
    made, workers = study()
    setting = made.choose("sae-lens", "gated")
    jobs = [job for _, job in workers.jobs if job["arch"] == "gated"]
    assert list(dict.fromkeys(job["lr"] for job in jobs)) == pytest.approx([9e-3, 2.7e-2, 2.7e-3])
    # The first coefficient, 2.0, gives an L0 of 0.25; a step may not be longer than a factor of 10.
    coefficients = [job["coefficient"] for job in jobs if job["lr"] == jobs[0]["lr"]]
    assert coefficients == [2.0, pytest.approx(0.2, rel=0.01), pytest.approx(0.125, rel=0.01)]
    assert setting == Setting(pytest.approx(9e-3), coefficients[-1])


def test_settings_chosen_on_other_data_are_taken_from_there(study: Callable[[], tuple[Study, FakeWorkers]]) -> None:
    tuning, workers = study()
    made = Study(
        "planted",
        tuning.folder,
        SHAPE,
        tuning.results,
        workers=workers,
        num_rates=1,
        tuned_on=tuning,
        say=lambda _: None,
    )
    made.run("sae-lens", "topk", 1)
    assert {row["data"] for row in made.results.find(seed=1)} == {"planted"}
    assert {row["data"] for row in made.results.find(seed=0)} == {"real"}
    assert made.results.find(seed=1)[0]["lr"] == pytest.approx(9e-3)


def test_our_own_settings_are_never_searched(study: Callable[[], tuple[Study, FakeWorkers]]) -> None:
    made, workers = study()
    made.run("saekit", "jumprelu", 2)
    assert [(job["lr"], job["coefficient"], job["seed"]) for _, job in workers.jobs] == [(None, None, 2)]


def test_what_is_among_the_results_is_not_trained_again(
    study: Callable[[], tuple[Study, FakeWorkers]], tmp_path: Path
) -> None:
    made, _ = study()
    made.run("sae-lens", "gated", 0)
    made.run("sae-lens", "gated", 1)
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines()
    # Killed in the middle of a line, after seed 0.
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    again, workers = study()
    again.run("sae-lens", "gated", 0)
    assert workers.jobs == []
    again.run("sae-lens", "gated", 1)
    assert [job["seed"] for _, job in workers.jobs] == [1]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(line) for line in lines]


def test_merit_does_not_count_an_sae_without_the_wanted_l0() -> None:
    good, cheat = {"l0": 4.0, "fvu": 0.5}, {"l0": 9.0, "fvu": 0.1}
    assert merit(good, 4) > merit(cheat, 4)
    assert merit({"l0": 4.0, "fvu": 0.5, "f1": 0.2}, 4) == pytest.approx(0.2)


def test_mean_interval_is_students() -> None:
    # Halves of the standard deviation 1 over sqrt(3), times 4.303.
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert math.isnan(mean_interval([1.0]).half)


def row(seed: int, fvu: float, *, spread: float = 0.0, **others: object) -> dict[str, Any]:
    errors = [fvu + spread, fvu - spread] * 20
    return {"seed": seed, "fvu": fvu, "errors": errors, "variances": [1.0] * 40, **others}


def test_difference_is_paired_by_seed() -> None:
    ours = [row(0, 0.1), row(1, 0.5), row(2, 0.9)]
    theirs = [row(2, 1.0), row(0, 0.2), row(1, 0.6)]
    found = difference(ours, theirs, "fvu")
    assert found.mean == pytest.approx(-0.1)
    assert found.half == pytest.approx(0.0, abs=1e-9)


def test_difference_of_fvu_has_the_spread_over_documents() -> None:
    found = difference([row(0, 0.1, spread=0.1), row(1, 0.1, spread=0.1)], [row(0, 0.2), row(1, 0.2)], "fvu")
    # The standard error of a mean of 40 values of +- 0.1, times 1.96.
    assert found.half == pytest.approx(1.96 * 0.1 / math.sqrt(40), rel=0.15)


@pytest.mark.parametrize(
    ("found", "more_is_better", "expected"),
    [
        (Interval(-0.2, 0.1), False, "better"),
        (Interval(-0.2, 0.1), True, "worse"),
        (Interval(0.2, 0.1), False, "worse"),
        (Interval(0.05, 0.1), False, "no difference"),
        (Interval(0.05, math.nan), False, "one seed"),
    ],
)
def test_verdict(found: Interval, more_is_better: bool, expected: str) -> None:
    assert verdict(found, more_is_better=more_is_better) == expected


def test_chosen_rows_are_those_of_the_setting_that_was_gone_on_with() -> None:
    searched = {"lr": 1e-3, "coefficient": None, "l0": 4.0}
    kept = {"lr": 3e-3, "coefficient": None, "l0": 4.0}
    rows = [row(0, 0.1, **searched), row(0, 0.2, **kept), row(1, 0.2, **kept)]
    assert [found["lr"] for found in chosen_rows(rows, k=4, seeds=3)] == [3e-3, 3e-3]
    assert [found["lr"] for found in chosen_rows(rows, k=4, seeds=1)] == [1e-3]
    assert chosen_rows([], k=4, seeds=3) == []


def test_write_table_names_the_best_peer_and_the_verdict(
    study: Callable[[], tuple[Study, FakeWorkers]], tmp_path: Path
) -> None:
    made, _ = study()
    for seed in range(2):
        for library in ("saekit", "sae-lens", "dictionary-learning"):
            made.run(library, "topk", seed)
    write_table(tmp_path / "quality.md", made.results, {"real": SHAPE}, seeds=2)
    text = (tmp_path / "quality.md").read_text()
    assert "## Real activations: F 32, k 4, 2 steps of 8 tokens" in text
    rows = [line for line in text.splitlines() if line.startswith("| TopK | FVU")]
    assert len(rows) == 1
    assert rows[0].endswith("| better |")
    assert "sae-lens 1.0, dictionary-learning 1.0" in text


def write_data(folder: Path) -> torch.Tensor:
    folder.mkdir()
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    np.save(folder / "train.npy", x.numpy())
    np.save(folder / "test.npy", x.numpy())
    np.save(folder / "documents.npy", np.arange(256) // 64)
    return x


@torch.no_grad()
def own_figures(sae: Any, x: torch.Tensor) -> dict[str, float]:
    out = sae(x)
    fvu = (x - out.x_hat).square().sum() / (x - x.mean(0)).square().sum()
    return {"fvu": float(fvu), "l0": float((sae.encode(x) != 0).sum()) / len(x)}


def test_measure_refuses_an_sae_that_its_library_describes_otherwise(tmp_path: Path) -> None:
    x = write_data(tmp_path / "data")
    sae = TopKSAE(TopKConfig(d_in=8, d_sae=16, k=2))
    sae.save(tmp_path / "sae")
    own = own_figures(sae, x)
    found = measure(tmp_path / "sae", tmp_path / "data", own, k=2)
    assert found["fvu"] == pytest.approx(own["fvu"], rel=1e-5)
    assert sum(found["errors"]) / sum(found["variances"]) == pytest.approx(found["fvu"])
    assert len(found["errors"]) == 4
    with pytest.raises(SystemExit, match=r"fvu is .* by us, .* by its library, needs the same"):
        measure(tmp_path / "sae", tmp_path / "data", own | {"fvu": own["fvu"] * 1.01}, k=2)


@pytest.mark.parametrize("kind", ["jumprelu", "relu"])
def test_measure_brings_an_sae_to_exactly_the_wanted_l0(tmp_path: Path, kind: str) -> None:
    x = write_data(tmp_path / "data")
    sae = JumpReLUSAE(JumpReLUConfig(d_in=8, d_sae=16)) if kind == "jumprelu" else ReLUSAE(ReLUConfig(d_in=8, d_sae=16))
    with torch.no_grad():
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.fill_(0.7)
        else:
            sae.b_enc.fill_(-0.7)
    sae.save(tmp_path / "sae")
    found = measure(tmp_path / "sae", tmp_path / "data", own_figures(sae, x), k=3)
    assert abs(found["raw_l0"] - 3) > 0.2
    assert found["l0"] == pytest.approx(3, abs=0.01)
