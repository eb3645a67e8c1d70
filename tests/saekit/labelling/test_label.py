"""The label stage from end to end: on planted features, on a tiny real model, and through a kill."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from saekit.activations import ActivationStore, CacheConfig, cache_activations
from saekit.errors import ConfigError, DataError
from saekit.labelling import (
    ChatRequest,
    FeatureContexts,
    LabelConfig,
    TokenEffects,
    effects_path,
    estimate_labels,
    label_features,
    read_labels,
    read_scores,
)
from saekit.manifest import read_manifest
from saekit.models import LanguageModel, load_model
from saekit.sae import TopKConfig, TopKSAE
from tests.saekit.labelling.bench import oracle
from tests.saekit.labelling.planted import FakeView, WordTokenizer, World
from tests.saekit.labelling.stub import serving

OFFLINE: dict[str, object] = {"vocab_projection": False, "token_change": None}
LM = SimpleNamespace(fingerprint="1" * 64, tokenizer=WordTokenizer())
ROOT = Path(__file__).parents[3]


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


_RUN = """
import sys
from types import SimpleNamespace
from saekit.labelling import LabelConfig, label_features
from tests.saekit.labelling.planted import WordTokenizer, make_world
world = make_world(120)
config = LabelConfig.parse({
    "labelers": ["lexical", "llm"], "vocab_projection": False, "token_change": None,
    "llm": {"model": "stub", "base_url": sys.argv[2], "concurrency": 2, "num_judged": 3},
})
label_features(world.sae, world.train, test=world.test, lm=SimpleNamespace(fingerprint="1" * 64, tokenizer=WordTokenizer()), out=sys.argv[1], config=config)
"""


def _start(out: Path, url: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", _RUN, str(out), url], env=env, cwd=ROOT)


def test_estimate_sends_nothing_and_the_run_goes_on_from_it(world, tmp_path) -> None:
    with serving(oracle) as server:
        llm = {"model": "stub", "base_url": server.url, "max_features": 3, "num_judged": 2}
        config = LabelConfig.parse({**OFFLINE, "labelers": ["lexical", "llm"], "llm": llm})
        views = {"test": world.test, "lm": LM, "out": tmp_path, "config": config}
        estimate = estimate_labels(world.sae, world.train, **views)
        assert server.requests == []
        assert not (tmp_path / "ledger.sqlite").exists()
        label_features(world.sae, world.train, **views)
    assert estimate.num_requests == len(server.requests) == 6
    assert read_manifest(tmp_path).counts["llm"]["answers"] == 6
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


@pytest.mark.slow
def test_killed_run_resumes_without_repeating_a_recorded_request(tmp_path) -> None:
    def slowly(body: dict[str, object], number: int) -> object:
        time.sleep(0.05)
        return oracle(body, number)

    with serving(slowly) as server:
        # Once among the explanations, once among the judgements.
        for enough in (4, 14):
            process = _start(tmp_path, server.url)
            while len(server.requests) < enough:
                assert process.poll() is None, "the run ended before it was killed"
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        recorded = _recorded(tmp_path)
        num_before = len(server.requests)
        assert read_manifest(tmp_path).status == "running"
        process = _start(tmp_path, server.url)
        assert process.wait() == 0
    asked_after = [_key(body) for body in server.requests[num_before:]]
    assert len(recorded) >= 8
    assert not set(asked_after) & recorded
    assert len(asked_after) == len(set(asked_after))
    assert _recorded(tmp_path) == {_key(body) for body in server.requests}
    labels = read_labels(tmp_path)
    keys = [(label.feature, label.labeler) for label in labels]
    assert len(keys) == len(set(keys))
    assert sorted(f for f, labeler in keys if labeler == "lexical") == list(range(11))
    firing = [feature for feature in range(11) if feature != 5]
    assert sorted(f for f, labeler in keys if labeler == "llm:stub") == firing
    judged = [(s.feature, s.labeler) for s in read_scores(tmp_path) if s.scorer == "detection"]
    assert sorted(judged) == [(feature, "llm:stub") for feature in firing]
    assert read_manifest(tmp_path).counts["llm"]["answers"] == 20


def _recorded(folder: Path) -> set[str]:
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        return {row[0] for row in db.execute("select key from requests where state = 'answered'")}


def _key(body: dict) -> str:
    """The ledger's key of a request as the server saw it."""
    schema = body["response_format"]["json_schema"]
    return ChatRequest(
        model=body["model"],
        system=body["messages"][0]["content"],
        user=body["messages"][1]["content"],
        schema_name=schema["name"],
        schema=schema["schema"],
        temperature=body["temperature"],
        max_output_tokens=body["max_tokens"],
    ).key()
