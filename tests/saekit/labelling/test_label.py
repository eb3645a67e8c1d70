"""The label stage from end to end: on planted features, on a tiny real model, and through a kill."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from saekit.activations import ActivationStore, CacheConfig, cache_activations
from saekit.config import changed_keys
from saekit.errors import ConfigError, DataError, LabelerError
from saekit.labelling import (
    FeatureContexts,
    LabelConfig,
    TokenEffects,
    effects_path,
    estimate_labels,
    label_features,
    read_controls,
    read_labels,
    read_scores,
)
from saekit.manifest import read_manifest
from saekit.models import LanguageModel, ModelConfig, load_model
from saekit.sae import TopKConfig, TopKSAE
from tests.saekit.labelling.batchstub import batch_serving
from tests.saekit.labelling.bench import JUDGED, oracle
from tests.saekit.labelling.planted import FakeView, WordTokenizer, World
from tests.saekit.labelling.stub import Fault, StubServer, serving

OFFLINE: dict[str, object] = {"vocab_projection": False, "token_change": None}
LM = SimpleNamespace(fingerprint="1" * 64, tokenizer=WordTokenizer())


def _label(world: World, out: Path, **options: object) -> Path:
    config = LabelConfig.parse({**OFFLINE, **options})
    return label_features(world.sae, world.train, test=world.test, lm=LM, out=out, config=config)


def test_planted_features_are_labelled_and_scored(world, tmp_path) -> None:
    assert _label(world, tmp_path) == tmp_path
    labels = {label.feature: label for label in read_labels(tmp_path)}
    scores = {score.feature: score for score in read_scores(tmp_path)}
    assert sorted(labels) == sorted(scores) == list(range(len(world.names)))
    assert labels[world.feature("new_york")].label == '"York" after "New"'
    assert scores[world.feature("new_york")].f1 == 1.0
    assert FeatureContexts.open(tmp_path / "contexts").num_features == len(world.names)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert (manifest.stage, manifest.status) == ("label", "complete")
    assert manifest.counts["labels"] == {"lexical": {"done": 11, "failed": 0}}
    controls = manifest.counts["rule_scores"]
    assert controls["f1"] > 0.85 > 0.2 > controls["shuffled_f1"]
    assert controls["empty_auprc"] == pytest.approx(
        np.mean([s.base_rate for s in scores.values() if s.f1 is not None]), abs=1e-5
    )


def test_finished_folder_is_left_alone_and_another_config_is_refused(world, tmp_path) -> None:
    _label(world, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    _label(world, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    _label(world, tmp_path, contexts={"batch_tokens": 99})
    with pytest.raises(ConfigError, match=r"contexts\.num_top \(20 there, 7 asked\)"):
        _label(world, tmp_path, contexts={"num_top": 7})
    with pytest.raises(ConfigError, match="its input"):
        label_features(
            world.sae,
            world.train,
            test=FakeView(world.store, world.test.mask & (np.arange(64) < 60)),
            lm=LM,
            out=tmp_path,
            config=LabelConfig.parse(OFFLINE),
        )


def _without(values: dict, keys: set[str]) -> dict:
    """A config as it stood in manifests before there were such keys."""
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in values.items() if k not in keys}


def test_folders_from_before_an_option_stay_what_they_are() -> None:
    later = {
        "num_candidates",
        "candidate_temperature",
        "num_counter_examples",
        "selection_fraction",
        "selection_scorer",
    }
    later |= {
        "num_selection",
        "near_share",
        "num_simulated",
        "simulation_form",
        "intervention_form",
        "steered",
        "input_test",
    }

    def changed(**llm: object) -> list[str]:
        config = LabelConfig.parse({"llm": {"model": "m", **llm}})
        return list(changed_keys(_without(config.to_dict(), later | {"concurrency"}), config.identity()))

    operational = set(changed(near_share=0.0))
    assert not operational & {f"llm.{key}" for key in later}
    # Near negatives were not there before: with them a folder has other scores.
    assert set(changed()) - operational == {"llm.near_share"}
    assert set(changed(num_judged=0)) == operational
    assert set(changed(near_share=0.0, num_candidates=3)) > operational
    assert any(key.startswith("llm.steered.") for key in changed(scorers=["output"]))
    model = ModelConfig.parse({"name": "m"}).to_dict()
    assert not changed_keys(_without(model, {"random_weights", "random_seed"}), model)


def test_max_features_labels_so_many(world, tmp_path) -> None:
    _label(world, tmp_path, max_features=4)
    features = [label.feature for label in read_labels(tmp_path)]
    assert len(features) == len(set(features)) == 4
    assert sorted(score.feature for score in read_scores(tmp_path)) == sorted(features)


def test_shared_document_is_refused(world, tmp_path) -> None:
    with pytest.raises(DataError, match="document 0 is in the training and in the held-out view"):
        label_features(world.sae, world.train, test=world.train, lm=LM, out=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labelers": ["llm"]}, r"needs a table \[llm\]"),
        ({"labelers": []}, "at least one labeler"),
        ({"labelers": ["lexcal"]}, "labelers"),
        ({"llm": {}}, "missing key 'llm.model'"),
        ({"token_change": {"num_contexts": 0}}, "token_change.num_contexts"),
        ({"token_chnge": None}, "did you mean 'token_change'"),
    ],
    ids=["no table", "no labeler", "unknown labeler", "no model", "no contexts", "typo"],
)
def test_bad_config_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LabelConfig.parse(values)


def test_interrupted_lexical_labelling_goes_on_where_it_was(world, tmp_path) -> None:
    whole = tmp_path / "whole"
    _label(world, whole)
    broken = tmp_path / "broken"
    _label(world, broken)
    # As a kill would leave it: manifest still running, labels cut in a line, no scores.
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["status"] = "running"
    (broken / "manifest.json").write_text(json.dumps(manifest))
    labels = broken / "labels.jsonl"
    labels.write_bytes(labels.read_bytes()[: len(labels.read_bytes()) // 2])
    (broken / "scores.jsonl").unlink()
    _label(world, broken)
    assert (broken / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()
    assert (broken / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()
    assert read_manifest(broken).status == "complete"


@pytest.fixture(scope="module")
def tiny_lm(tiny_model_dir) -> LanguageModel:
    return load_model(str(tiny_model_dir("llama")))


@pytest.fixture(scope="module")
def tiny_store(tiny_lm, documents_file, tmp_path_factory) -> ActivationStore:
    config = CacheConfig.parse(
        {
            "model": {"name": tiny_lm.name},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 32},
            "hook_points": ["model.layers.1"],
            "num_tokens": 700,
        }
    )
    out = tmp_path_factory.mktemp("cache")
    cache_activations(config, out, lm=tiny_lm)
    return ActivationStore.open(out)


def test_real_store_and_model_give_every_artifact(tiny_store, tiny_lm, tmp_path) -> None:
    train, test = tiny_store.split(0.3)
    sae = TopKSAE(TopKConfig(d_in=tiny_store.d_in, d_sae=48, k=4), hook_point="model.layers.1")
    config = LabelConfig.parse({"token_change": {"num_features": 5, "num_contexts": 2, "context_len": 6}})
    label_features(sae, train, test=test, lm=tiny_lm, out=tmp_path, config=config)
    assert len(read_labels(tmp_path)) == len(read_scores(tmp_path)) == 48
    assert len(TokenEffects.open(effects_path(tmp_path, "vocabproj")).features) == 48
    changed = TokenEffects.open(effects_path(tmp_path, "tokenchange"))
    assert len(changed.features) == 5
    rows = pq.read_table(tmp_path / "labels.parquet").to_pylist()
    assert {row["feature"] for row in rows if row["output_score"] is not None} == set(changed.features.tolist())
    assert sum(row["input_score"] is not None for row in rows) == sum(
        label.label != "never fires" for label in read_labels(tmp_path)
    )
    by_feature = {label.feature: label for label in read_labels(tmp_path)}
    # The steered ones are those whose rules fit best.
    assert (
        min(by_feature[int(f)].confidence for f in changed.features)
        >= sorted(label.confidence for label in by_feature.values())[-5]
    )
    assert all(label.promotes and label.suppresses for label in by_feature.values())


def test_dictionary_of_another_width_is_refused(tiny_store, tiny_lm, tmp_path) -> None:
    train, test = tiny_store.split(0.3)
    sae = TopKSAE(TopKConfig(d_in=7, d_sae=9, k=2), hook_point="model.layers.1")
    with pytest.raises(DataError, match="32 wide, the dictionary needs 7"):
        label_features(sae, train, test=test, lm=tiny_lm, out=tmp_path)


def test_estimate_sends_nothing_and_the_run_goes_on_from_it(world, tmp_path) -> None:
    with serving(oracle) as server:
        llm = {"model": "stub", "base_url": server.url, "max_features": 3, "num_judged": 2, "num_controlled": 0}
        config = LabelConfig.parse({**OFFLINE, "labelers": ["lexical", "llm"], "llm": llm})
        views = {"test": world.test, "lm": LM, "out": tmp_path, "config": config}
        estimate = estimate_labels(world.sae, world.train, **views)
        assert server.requests == []
        assert not (tmp_path / "ledger.sqlite").exists()
        label_features(world.sae, world.train, **views)
    # One of the three is active in every piece of text, so there is nothing to tell apart.
    assert estimate.num_requests == len(server.requests) == 5
    assert read_manifest(tmp_path).counts["llm"]["answers"] == 5
    with pytest.raises(ConfigError, match="no labelling model"):
        estimate_labels(world.sae, world.train, **{**views, "config": LabelConfig.parse(OFFLINE)})


def test_missing_key_is_found_before_anything_is_written(world, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        _label(world, tmp_path, labelers=["llm"], llm={"model": "m"})
    assert not any(tmp_path.iterdir())


def test_empty_view_is_refused(world, tmp_path) -> None:
    empty = FakeView(world.store, np.zeros_like(world.test.mask))
    with pytest.raises(DataError, match="held-out view has no tokens"):
        label_features(world.sae, world.train, test=empty, lm=LM, out=tmp_path)


def _llm(server: StubServer, **options: object) -> dict[str, object]:
    return {
        "model": "stub",
        "base_url": server.url,
        "num_judged": 2,
        "num_controlled": 0,
        "wait_seconds": 0.001,
        **options,
    }


def _report(folder: Path) -> dict:
    return json.loads((folder / "label_report.json").read_text())


def _is_about(body: dict[str, object], word: str) -> bool:
    """Whether a question shows texts in which nothing but one word is marked."""
    return set(re.findall("\u00ab(.*?)\u00bb", str(body["messages"][1]["content"]))) == {word}  # type: ignore[index]


def test_no_feature_vanishes_from_the_report(world, tmp_path) -> None:
    def some_fail(body: dict[str, object], number: int) -> object:
        return Fault(400, error={"message": "will not"}) if _is_about(body, "quasar") else oracle(body, number)

    with serving(some_fail) as server:
        prices = {"price_input": 1.0, "price_output": 2.0}
        _label(
            world,
            tmp_path,
            max_features=10,
            llm=_llm(server, max_features=7, explainers=["raw", "vocabproj"], **prices),
        )
    report = _report(tmp_path)
    assert report["features"] == len(world.names) == 11
    for labeler in report["labelers"].values():
        assert labeler["labelled"] + labeler["failed"] + labeler["skipped"] + labeler["missing"] == 11
    raw = report["labelers"]["llm:stub"]
    assert (raw["labelled"], raw["failed"], raw["skipped"]) == (6, 1, 4)
    assert list(raw["failed_features"]) == [str(world.feature("quasar"))]
    assert "will not" in raw["failed_features"][str(world.feature("quasar"))]
    assert set(raw["skipped_features"]) == {
        "never fires",
        "not drawn: max_features",
        "its token rule explains enough: llm.max_features",
    }
    projected = report["labelers"]["llm:stub:vocabproj"]
    assert projected["skipped_features"]["no evidence of this kind was gathered"].count(",") >= 1
    assert report["labelers"]["lexical"]["labelled"] == 10
    llm = report["llm"]
    assert llm["requests_sent"] == len(server.requests)
    assert llm["cost"] == pytest.approx(sum(i + 2 * o for i, o in server.charged) / 1e6)
    assert llm["cost_per_feature"] == pytest.approx(llm["cost"] / 6)


def test_table_has_every_label_and_what_each_feature_cost(world, tmp_path) -> None:
    with serving(oracle) as server:
        _label(world, tmp_path, llm=_llm(server, max_features=3, price_input=1.0, price_output=2.0))
    table = pq.read_table(tmp_path / "labels.parquet")
    rows = table.to_pylist()
    labels = sorted(read_labels(tmp_path), key=lambda label: (label.feature, label.labeler))
    assert [(row["feature"], row["labeler"], row["label"]) for row in rows] == [
        (label.feature, label.labeler, label.label) for label in labels
    ]
    assert set(table.column_names) == {
        *type(labels[0]).model_fields,
        "feature_cost",
        "input_score",
        "output_score",
    }
    explained = [row for row in rows if row["evidence"] is not None]
    assert len(explained) == 3
    for row in explained:
        # One question for the label, one for the judge where there is something to tell apart.
        asked = 2 if row["feature"] in JUDGED else 1
        assert (row["cost"], row["feature_cost"]) == (pytest.approx(120e-6), pytest.approx(asked * 120e-6))
    assert json.loads(rows[0]["rule"])["clauses"] is not None
    assert table.schema.metadata[b"saekit.labels"] == b"1"


def test_failed_features_are_asked_again_on_demand_and_stay_paid(world, tmp_path) -> None:
    is_bad = True

    def moody(body: dict[str, object], number: int) -> object:
        return "no json" if is_bad and _is_about(body, "quasar") else oracle(body, number)

    quasar = world.feature("quasar")
    with serving(moody) as server:
        options = {"llm": _llm(server, explainers=["raw", "input", "concat"])}
        _label(world, tmp_path, **options)
        assert _report(tmp_path)["labelers"]["llm:stub"]["failed"] == 1
        assert _report(tmp_path)["labelers"]["llm:stub:concat"]["failed"] == 1
        asked = len(server.requests)
        _label(world, tmp_path, **options)
        assert len(server.requests) == asked
        is_bad = False
        config = LabelConfig.parse({**OFFLINE, **options})
        views = {"test": world.test, "lm": LM, "out": tmp_path, "config": config, "retry_failed": True}
        label_features(world.sae, world.train, **views)
        # Without token effects `raw` and `input` are one question, and the judge reads the same text of all three.
        assert len(server.requests) == asked + 2
        assert read_manifest(tmp_path).status == "complete"
        label_features(world.sae, world.train, **views)
        assert len(server.requests) == asked + 2
    own = [label for label in read_labels(tmp_path) if label.feature == quasar and label.evidence is not None]
    assert sorted((label.evidence, label.status) for label in own) == [
        ("concat", "done"),
        ("input", "done"),
        ("raw", "done"),
    ]
    report = _report(tmp_path)
    assert report["labelers"]["llm:stub"]["failed"] == 0
    assert report["llm"]["answers"] == len(server.charged)
    judged = [
        score.labeler for score in read_scores(tmp_path) if score.feature == quasar and score.scorer == "detection"
    ]
    assert sorted(judged) == ["llm:stub", "llm:stub:concat", "llm:stub:input"]


def test_stopped_run_says_what_is_missing(world, tmp_path) -> None:
    with serving(oracle) as server, pytest.raises(LabelerError, match="max_requests"):
        _label(world, tmp_path, llm=_llm(server, max_requests=4))
    raw = _report(tmp_path)["labelers"]["llm:stub"]
    assert (raw["labelled"], raw["missing"]) == (4, 6)
    assert len(pq.read_table(tmp_path / "labels.parquet")) == 11 + 4


@pytest.mark.parametrize("changed", [{"concurrency": 3}, {"max_cost": 9.0, "price_input": 1.0, "price_output": 1.0}])
def test_how_a_model_is_reached_may_change_between_runs(world, tmp_path, changed: dict[str, object]) -> None:
    with serving(oracle) as server:
        _label(world, tmp_path, llm=_llm(server))
        asked = len(server.requests)
        _label(world, tmp_path, llm=_llm(server, **changed))
        assert len(server.requests) == asked
        with pytest.raises(ConfigError, match="explainers"):
            _label(world, tmp_path, llm=_llm(server, explainers=["input"]))


def test_batches_label_the_same_as_single_questions(world, tmp_path) -> None:
    with serving(oracle) as server:
        _label(world, tmp_path / "single", llm=_llm(server))
    with batch_serving(oracle) as server:
        _label(world, tmp_path / "batch", llm=_llm(server, backend="batch", batch={"poll_seconds": 0.001}))
    assert len(server.batches) == 2
    by_name = lambda record: (record.feature, record.labeler)  # noqa: E731
    for read in (read_labels, read_scores):
        single, batch = (sorted(read(tmp_path / name), key=by_name) for name in ("single", "batch"))
        assert single == batch


def test_scorers_and_controls_are_estimated_and_reported(world, tmp_path) -> None:
    def by_feature(body: dict[str, object], number: int) -> str:
        # Labels of different features differ, so that each control is a question of its own.
        user = str(body["messages"][1]["content"])  # type: ignore[index]
        if user.startswith("Group 1"):
            return '{"answers": [{"id": 1, "intruder": "a"}]}'
        answer = oracle(body, number)
        return answer.replace("words for waters", f"words for waters {len(user)}") if "Pieces:" not in user else answer

    with serving(by_feature) as server:
        scorers = ["detection", "fuzzing", "intruder"]
        llm = _llm(server, num_controlled=4, scorers=scorers, price_input=1.0, price_output=2.0, attempts=1)
        config = LabelConfig.parse({**OFFLINE, "llm": llm})
        views = {"test": world.test, "lm": LM, "out": tmp_path, "config": config}
        estimate = estimate_labels(world.sae, world.train, **views)
        assert server.requests == []
        label_features(world.sae, world.train, **views)
    assert estimate.num_requests == len(server.requests)
    assert {score.scorer for score in read_scores(tmp_path)} == {"rule", "detection", "fuzzing"}
    controls = {(score.scorer, score.labeler) for score in read_controls(tmp_path)}
    assert len(controls) == 2 * 3 + 1
    entries = _report(tmp_path)["scores"]
    assert [(entry["scorer"], entry["labeler"]) for entry in entries][:4] == [
        ("detection", "llm:stub"),
        ("detection", "control:empty"),
        ("detection", "control:random"),
        ("detection", "control:shuffled"),
    ]
    assert {entry["judge"] for entry in entries} == {"stub"}
    assert all(0 < entry["natural_rate"] < 1 for entry in entries if entry["scorer"] != "intruder")
    assert _report(tmp_path)["llm"]["answers"] == len(server.requests)
