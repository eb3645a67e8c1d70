import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saekit.activations import ActivationStore
from saekit.report.overview import describe_run, describe_store
from saekit.report.sources import RunSource, read_run


@pytest.fixture(scope="module")
def source(report: Any) -> RunSource:
    """The first run, read."""
    return read_run(report.runs[0], store_sha256=ActivationStore.open(report.store).sha256)


def _source(curves: list[dict[str, object]]) -> RunSource:
    return RunSource(
        name="x",
        architecture={"kind": "topk", "d_sae": 4},
        hook_point=None,
        curves=curves,
        contexts=None,
        effects={},
        labels={},
        scores={},
        evaluation=None,
    )


def test_curves_are_the_logged_rows_by_split(report: Any, source: RunSource) -> None:
    curves = describe_run(source)["curves"]
    rows = [json.loads(line) for line in (report.runs[0].sae / "metrics.jsonl").read_text().splitlines()]
    for split in ("train", "test"):
        here = [row for row in rows if row["split"] == split]
        for column in ("tokens", "loss", "fvu", "l0"):
            assert curves[split][column] == [row[column] for row in here]  # type: ignore[index,call-overload]
    assert "dead_fraction" in curves["train"]  # type: ignore[operator,index,call-overload]
    assert "dead_fraction" not in curves["test"]  # type: ignore[operator,index,call-overload]


def test_long_curves_keep_even_points_and_both_ends() -> None:
    rows: list[dict[str, object]] = [{"tokens": n, "loss": n / 10, "split": "train"} for n in range(5000)]
    curves: Any = describe_run(_source(rows))["curves"]
    tokens = curves["train"]["tokens"]
    assert len(tokens) == 400
    assert (tokens[0], tokens[-1]) == (0, 4999)
    assert set(np.diff(tokens)) <= {12, 13}
    assert curves["train"]["loss"] == [token / 10 for token in tokens]


def test_curves_turn_nan_into_gaps_and_drop_rows_without_tokens() -> None:
    rows: list[dict[str, object]] = [{"tokens": 1, "loss": float("nan")}, {"loss": 2.0}, {"tokens": 3, "loss": 0.5}]
    assert describe_run(_source(rows))["curves"] == {"train": {"tokens": [1.0, 3.0], "loss": [None, 0.5]}}


def test_density_histogram_counts_every_feature(source: RunSource) -> None:
    density: Any = describe_run(source)["density"]
    assert source.density is not None
    logs = np.log10(source.density[source.density > 0])
    assert density["never"] == 10
    assert sum(density["counts"]) == len(logs) == 140
    assert density["edges"][0] <= logs.min()
    assert density["edges"][-1] >= logs.max()
    np.testing.assert_allclose(np.diff(density["edges"]), 0.125)
    assert density["counts"][5] == ((logs >= density["edges"][5]) & (logs < density["edges"][6])).sum()


def test_labeler_medians_are_over_scored_labels(report: Any, source: RunSource) -> None:
    lines = [json.loads(line) for line in (report.runs[0].labels / "scores.jsonl").read_text().splitlines()]
    labelers: Any = describe_run(source)["labelers"]
    for labeler, scorer in zip(labelers, ("detection", "rule"), strict=True):
        f1 = [line["f1"] for line in lines if line["labeler"] == labeler["name"]]
        assert (labeler["done"], labeler["failed"]) == (139, 1)
        assert labeler["scorers"][scorer]["scored"] == len(f1) == 139
        assert labeler["scorers"][scorer]["f1"] == pytest.approx(np.median(f1))
        assert labeler["scorers"][scorer]["base_rate"] == pytest.approx(0.004)


def test_evaluation_keeps_values_intervals_and_nulls(report: Any, source: RunSource) -> None:
    shown: Any = describe_run(source)["evaluation"]
    written = json.loads((report.runs[0].evaluation / "evaluation.json").read_text())
    assert [row["name"] for row in shown["rows"]] == ["sae", "mean", "pca", "random"]
    for row, expected in zip(shown["rows"], written["rows"], strict=True):
        for name, figure in expected["metrics"].items():
            values = [figure["value"], figure["low"], figure["high"]]
            assert row["metrics"][name] == (None if figure["value"] is None else values)
    assert shown["reference"]["kl_mean"] is None
    assert all(metric["definition"] for metric in shown["metrics"])


def test_norm_profile_counts_every_token_by_kind(report: Any) -> None:
    store = ActivationStore.open(report.store)
    profile: Any = describe_store(store)
    kinds, norms = store.kinds(), store.norms()
    for name, kind in (("normal", 0), ("special", 2), ("massive", 3)):
        assert profile["tokens"][name] == (kinds == kind).sum()
        assert sum(profile["norm_histogram"]["series"][name]) == (kinds == kind).sum()
    used = np.where(kinds == 0, norms.astype(np.float64), np.nan)
    expected = [np.nanmean(column) if np.isfinite(column).any() else None for column in used.T]
    assert profile["position_norms"] == pytest.approx(expected, rel=1e-5)


def test_a_report_has_the_identity_of_all_its_stages(report: Any, read_payload: Callable[[Path], Any]) -> None:
    value = read_payload(report.folder / "data" / "report.js")
    run = value["runs"][0]
    assert set(run["stages"]) == {"train", "contexts", "label", "evaluate"}
    folders = {"train": report.runs[0].sae, "label": report.runs[0].labels, "evaluate": report.runs[0].evaluation}
    for stage, folder in folders.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        assert run["stages"][stage]["config_sha256"] == manifest["config_sha256"]
        assert run["stages"][stage]["versions"] == manifest["versions"]
    assert value["cache"]["config"]["num_tokens"] == 4000


def test_controls_of_the_rules_are_shown_where_the_label_stage_counted_them(source: RunSource) -> None:
    assert describe_run(source)["controls"] is None
    counts = {"rule_scores": {"labels": 9, "f1": 0.5, "shuffled_f1": 0.01, "always_f1": float("nan")}}
    manifests = source.manifests | {"label": source.manifests["label"].model_copy(update={"counts": counts})}
    found = describe_run(dataclasses.replace(source, manifests=manifests))["controls"]
    assert found == {"labels": 9.0, "f1": 0.5, "shuffled_f1": 0.01, "always_f1": None}
