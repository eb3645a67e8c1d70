"""The benchmark of SAEs of several hook points without its peers: what is read and predicted, its search, its tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit import load_sae
from saekit.activations import CacheConfig, cache_activations
from saekit.models import load_model
from saekit.training import end_to_end
from scripts import bench_quality_runs, bench_quality_sites_e2e
from scripts.bench_quality_data import Shape
from scripts.bench_quality_measure import measure, pooled
from scripts.bench_quality_runs import Results, Setting, Study, Workers
from scripts.bench_quality_sites_e2e import METRICS, Ending, run_e2e
from scripts.bench_quality_sites_table import shares, side_by_side, single_name, site_lines, write_sites_table
from scripts.bench_quality_worker import Job, own_figures, sites_of, train_saekit

WIDTH = 8
SHAPE = Shape(d_sae=16, k=3, batch=32, steps=2, test_tokens=64)
PLACES = {"mlp": ["mlp:input", "mlp"], "residual": ["early", "late"], "e2e": ["late"]}


def test_sites_of_gives_what_is_read_and_what_is_to_be_reconstructed() -> None:
    rows = torch.arange(12.0).view(2, 6)
    x, target = sites_of(rows, sites=2, site=None, is_transcoder=True)
    assert x.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert target.tolist() == [[[3, 4, 5]], [[9, 10, 11]]]
    x, target = sites_of(rows, sites=3, site=1, is_transcoder=False)
    assert x.tolist() == [[2, 3], [8, 9]]
    assert target.tolist() == [[[2, 3]], [[8, 9]]]
    x, target = sites_of(rows, sites=3, site=None, is_transcoder=False)
    assert x.shape == (2, 6)
    assert target[1].tolist() == [[6, 7], [8, 9], [10, 11]]


def test_pooled_weighs_hook_points_alike_and_leaves_one_as_it_is() -> None:
    errors = torch.tensor([[1.0, 3.0], [100.0, 500.0]])
    variances = torch.tensor([[4.0, 4.0], [500.0, 500.0]])
    found = pooled(errors, variances)
    assert sum(found["errors"]) / sum(found["variances"]) == pytest.approx((0.5 + 0.6) / 2)
    assert [site["fvu"] for site in found["sites"]] == pytest.approx([0.5, 0.6])
    assert pooled(errors[:1], variances[:1]) == {"errors": [1.0, 3.0], "variances": [4.0, 4.0]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two hook points, the second ten times as large and partly a function of the first."""
    folder = tmp_path_factory.mktemp("data")
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([x, 10 * (x.roll(1, dims=1).relu() + 1)], dim=1).numpy()
    np.save(folder / "train.npy", rows)
    np.save(folder / "test.npy", rows)
    np.save(folder / "documents.npy", np.arange(64) // 16)
    return folder


@pytest.mark.parametrize(
    ("arch", "site", "places"),
    [("skip_transcoder", None, 1), ("crosscoder_batchtopk", None, 2), ("mlsae", None, 2), ("topk", 1, 1)],
)
def test_a_trained_sae_is_measured_as_its_own_forward_says(
    data: Path, tmp_path: Path, arch: str, site: int | None, places: int
) -> None:
    job = Job(
        arch=arch,
        seed=0,
        data=str(data),
        d_sae=16,
        k=3,
        batch=32,
        steps=2,
        out=str(tmp_path),
        lr=None,
        coefficient=None,
        sites=2,
        site=site,
    )
    own = own_figures(train_saekit(job), job)
    found = measure(tmp_path, data, own, k=3, sites=2, site=site, is_transcoder=job.is_transcoder)
    assert sum(found["errors"]) / sum(found["variances"]) == pytest.approx(found["fvu"])
    assert len(found.get("sites", [0])) == places
    assert 0 < found["l0"] <= 3.1
    assert 0 <= found["dead"] < 1
    # Computed once more from the raw weights of the file.
    sae, rows = load_sae(tmp_path), torch.from_numpy(np.load(data / "test.npy"))
    if arch in {"skip_transcoder", "topk"}:
        y = rows[:, WIDTH:]
        y_hat = sae(rows[:, :WIDTH] if site is None else y).x_hat.detach()
        true = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
        assert found["fvu"] == pytest.approx(float(true), rel=1e-4)
    with pytest.raises(SystemExit, match="needs the same"):
        measure(
            tmp_path, data, own | {"fvu": own["fvu"] * 1.01}, k=3, sites=2, site=site, is_transcoder=job.is_transcoder
        )


def test_a_transcoders_rate_is_searched_past_both_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []

    class FakeWorkers(Workers):
        def ask(self, library: str, job: dict[str, Any]) -> dict[str, Any]:
            jobs.append(job)
            return {"sae": job["out"], "seconds": 1.0}

        def version(self, library: str) -> str:
            return "1.0"

    def figures(*_: object, sites: int, site: int | None, **__: object) -> dict[str, Any]:
        assert (sites, site) == (2, None)
        # The lower the rate, the better, down to a twentieth of the lowest that is tried at first.
        fvu = abs(np.log(jobs[-1]["lr"] / lowest * 20))
        return {"raw_l0": 3.0, "l0": 3.0, "raw_fvu": fvu, "fvu": fvu, "dead": 0.0}

    monkeypatch.setattr(bench_quality_runs, "measure", figures)
    workers = FakeWorkers(lambda: Path("nowhere"), 1)
    results = Results(tmp_path / "results.jsonl")
    study = Study("mlp", tmp_path, SHAPE, results, workers=workers, num_rates=1, sites=2, say=lambda _: None)
    lowest = 0.1 * bench_quality_runs.base_lr("eai-sparsify", SHAPE.d_sae)
    setting = study.choose("eai-sparsify", "transcoder")
    expected = [lowest * factor for factor in (1, 3, 10, 1 / 3, 1 / 9, 1 / 27, 1 / 81)]
    assert [job["lr"] for job in jobs] == pytest.approx(expected, rel=0.01)
    assert setting == Setting(pytest.approx(lowest / 27, rel=0.01), None)
    assert {(job["sites"], job["site"]) for job in jobs} == {(2, None)}


def test_shares_add_up_to_k() -> None:
    assert shares(32, 3) == [11, 11, 10]
    assert shares(30, 3) == [10, 10, 10]


def row(seed: int, fvu: float, **others: object) -> dict[str, Any]:
    return {
        "seed": seed,
        "fvu": fvu,
        "errors": [fvu, fvu],
        "variances": [1.0, 1.0],
        "l0": 3.0,
        "raw_l0": 3.0,
        "dead": 0.25,
        **others,
    }


def sites_row(seed: int, fvus: list[float], **others: object) -> dict[str, Any]:
    sums = (torch.tensor([[fvu, fvu] for fvu in fvus], dtype=torch.float64), torch.ones(len(fvus), 2))
    return row(seed, sum(fvus) / len(fvus)) | pooled(*sums) | others


def test_side_by_side_takes_seeds_that_all_hook_points_have() -> None:
    found = side_by_side([[row(1, 0.2), row(0, 0.4)], [row(1, 0.6)]])
    assert len(found) == 1
    assert found[0]["fvu"] == pytest.approx(0.4)
    assert sum(found[0]["errors"]) / sum(found[0]["variances"]) == pytest.approx(0.4)
    assert [site["fvu"] for site in found[0]["sites"]] == pytest.approx([0.2, 0.6])
    assert found[0]["l0"] == 6.0


def test_site_lines_compare_at_each_hook_point_and_on_average() -> None:
    ours = [sites_row(seed, [0.3, 0.2]) for seed in range(3)]
    null = [sites_row(seed, [0.2, 0.4]) for seed in range(3)]
    lines = site_lines({"joint": ours, "apart": null, "missing": []}, ["joint"], PLACES["residual"])
    assert not any("missing" in line for line in lines)
    assert lines[-1].split(" | ")[1:] == [
        "apart",
        "-0.0500 ± 0.0000, better",
        "0.1000 ± 0.0000, worse",
        "-0.2000 ± 0.0000, better |",
    ]


def test_write_sites_table_has_a_part_for_all_that_was_trained(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    common = {"lr": None, "coefficient": None, "version": "1.0", "library": "saekit"}
    for seed in range(2):
        for library, fvu in (("saekit", 0.2), ("eai-sparsify", 0.3)):
            results.add(row(seed, fvu, **common | {"data": "mlp", "arch": "transcoder", "library": library}))
        results.add(sites_row(seed, [0.3, 0.2], data="residual", arch="mlsae", **common))
        for site in range(2):
            results.add(row(seed, 0.25, data=single_name(site, 3), arch="topk", **common))
    path = tmp_path / "sites.md"
    path.with_name("sites_notes.md").write_text("- A note.\n")
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    metrics = dict.fromkeys(METRICS, figure) | {"l0": {"value": 3.0, "low": None, "high": None}}
    results.add(
        {"data": "e2e", "library": "saekit", "arch": "kl_finetune", "seed": 0, "version": "1.0", "metrics": metrics}
    )
    write_sites_table(path, results, SHAPE, Ending(1, 1e-3, 64), places=PLACES, seeds=2)
    text = path.read_text()
    assert "## Transcoders from mlp:input to mlp: F 16, k 3, 2 steps of 32 tokens" in text
    assert "| Transcoder | FVU | eai-sparsify | -0.1000 ± 0.0000 | better |" in text
    assert "| multi-layer SAE | 2 | 3.0 | 0.2500 ± 0.0000 | 0.3000 ± 0.0000 | 0.2000 ± 0.0000 | 0.2500 |" in text
    assert "| multi-layer SAE | a TopK SAE each, k 3 |" in text
    assert "Crosscoders" not in text.split("## ", 1)[1]
    assert "- A note." in text
    assert "## Losses through the model at late: the last 1 of 2 steps under each loss" in text
    assert "| kl_finetune | 0 | 0.5000 [0.2500, 0.7500] | 3.0000 | 0.5000 [0.2500, 0.7500] |" in text


def test_run_e2e_ends_one_training_under_each_objective(
    tiny_model_dir: Callable[[str], Path], documents_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "MEASURED_POSITIONS", 1)
    objectives = ("mse", "kl_finetune")
    monkeypatch.setattr(bench_quality_sites_e2e, "OBJECTIVES", objectives)
    name = str(tiny_model_dir("llama"))
    config = CacheConfig.parse(
        {
            "model": {"name": name},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 16},
            "hook_points": ["model.layers.1"],
            "num_tokens": 320,
            "dtype": "float32",
        }
    )
    cache_activations(config, tmp_path / "cache", lm=load_model(name))
    results = Results(tmp_path / "results.jsonl")
    said: list[str] = []
    for _ in range(2):
        run_e2e(
            tmp_path,
            tmp_path / "cache",
            "model.layers.1",
            SHAPE,
            Ending(1, 1e-3, 32),
            results,
            test_fraction=0.3,
            seed=0,
            say=said.append,
        )
    assert [row["arch"] for row in results.rows] == list(objectives)
    assert len(said) == len(objectives)
    assert all(row["metrics"]["kl"]["value"] > 0 for row in results.rows)
    # Each goes on from the same SAE, and somewhere else.
    start = load_sae(tmp_path / "start-0").W_dec
    ends = [load_sae(tmp_path / f"{kind}-0").W_dec for kind in objectives]
    assert all(0 < float((end - start).detach().norm()) < 0.5 * float(start.detach().norm()) for end in ends)
    assert all(not torch.equal(ends[0], end) for end in ends[1:])
