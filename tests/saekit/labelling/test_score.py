"""Scoring labels that are there: other programs' too, another judge, resumed by the ledger, estimated to the request."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from saekit.errors import ConfigError
from saekit.labelling import (
    Label,
    LabelConfig,
    compare_labels,
    estimate_scores,
    label_features,
    read_controls,
    read_labels,
    read_scores,
    score_labels,
)
from saekit.manifest import read_manifest
from tests.saekit.labelling.noisyoracle import PATTERNS, NoisyOracle, describe
from tests.saekit.labelling.planted import FakeView, WordTokenizer, World
from tests.saekit.labelling.stub import StubServer, serving

LM = SimpleNamespace(fingerprint="1" * 64, tokenizer=WordTokenizer())
OFFLINE = {"vocab_projection": False, "token_change": None}
NAMES = ("river", "digit")


def _config(server: StubServer, **options: object) -> LabelConfig:
    llm = {
        "model": "stub",
        "base_url": server.url,
        "num_judged": 3,
        "num_controlled": 1,
        "near_share": 0.0,
        "wait_seconds": 0.001,
        **options,
    }
    return LabelConfig.parse({**OFFLINE, "llm": llm})


def _foreign(world: World, path: Path, **more: object) -> Path:
    lines = [{"feature": world.feature(name), "label": describe(PATTERNS[name]), **more} for name in NAMES]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _score(world: World, out: Path, config: LabelConfig, **options: object) -> Path:
    return score_labels(world.sae, world.test, lm=LM, out=out, config=config, **options)  # type: ignore[arg-type]


def test_labels_of_another_program_are_scored_resumed_and_compared(world, tmp_path) -> None:
    labels = _foreign(world, tmp_path / "theirs.jsonl", hook="unknown")
    out = tmp_path / "out"
    with serving(NoisyOracle(0.0)) as server:
        config = _config(server)
        views = {"lm": LM, "out": out, "config": config, "labels": labels}
        estimate = estimate_scores(world.sae, world.test, **views)
        assert server.requests == []
        assert not out.exists()
        _score(world, out, config, labels=labels)
        asked = len(server.requests)
        assert asked == estimate.num_requests == 2 + 3
        assert estimate_scores(world.sae, world.test, **views).num_requests == 0
        _score(world, out, config, labels=labels)
        (out / "scores.jsonl").unlink()
        # Scores that are lost come from the ledger.
        _score(world, out, config)
        assert len(server.requests) == asked
        # Another judge stands beside the first; fewer texts take the place of more.
        _score(world, out, _config(server, model="other"))
        assert {score.judge for score in read_scores(out)} == {"stub", "other"}
        _score(world, out, _config(server, num_judged=2))
    found = {score.judge: score for score in read_scores(out) if score.feature == world.feature("river")}
    assert (found["stub"].num_positive, found["other"].num_positive) == (2, 3)
    assert len(read_scores(out)) == 4
    assert {score.labeler for score in read_scores(out)} == {"foreign:theirs"}
    assert all(score.f1 == 1.0 for score in read_scores(out))
    assert {score.labeler for score in read_controls(out)} == {f"control:{n}" for n in ("empty", "random", "shuffled")}
    report = json.loads((out / "label_report.json").read_text())
    assert report["labelers"]["foreign:theirs"]["labelled"] == 2
    assert {entry["judge"] for entry in report["scores"]} == {"stub", "other"}
    assert pq.read_table(out / "labels.parquet").num_rows == 2
    assert (read_manifest(out).stage, read_manifest(out).status) == ("score", "complete")


def test_labels_of_a_run_get_more_scores_where_they_are(world, tmp_path) -> None:
    out = tmp_path / "label"
    label_features(world.sae, world.train, test=world.test, lm=LM, out=out, config=LabelConfig.parse(OFFLINE))
    before = read_manifest(out), read_labels(out)
    labels = _foreign(world, tmp_path / "x.jsonl", labeler="other program")
    with serving(NoisyOracle(0.0)) as server:
        config = _config(server, num_controlled=0)
        _score(world, out, config, labelers=["lexical"], labels=labels)
        assert len({score.feature for score in read_scores(out) if score.scorer == "detection"}) == 11
        with pytest.raises(ConfigError, match="no labels of 'nobody', there are those of lexical, other program"):
            _score(world, out, config, labelers=["nobody"])
        _score(world, out, config)
        small = _config(server, num_controlled=0, max_features=2, scorers=["fuzzing"])
        _score(world, out, small, labelers=["lexical"])
    assert len([score for score in read_scores(out) if score.scorer == "fuzzing"]) == 2
    assert read_manifest(out) == before[0]
    assert read_labels(out)[: len(before[1])] == before[1]
    found = compare_labels(out, out, labeler="lexical", other="other program")
    assert [(one.scorer, one.num_features) for one in found] == [("detection", 2)]
    # A changed label loses its scores and is judged anew.
    changed = tmp_path / "x.jsonl"
    changed.write_text(changed.read_text().replace("words: ", "some words: "))
    with serving(NoisyOracle(0.0)) as server:
        _score(world, out, _config(server, num_controlled=0), labels=changed)
        assert len(server.requests) == 2


def test_what_got_no_usable_answer_is_asked_again_on_demand(world, tmp_path) -> None:
    labels = _foreign(world, tmp_path / "x.jsonl")
    with serving(lambda *_: "no idea") as server:
        config = _config(server, attempts=1, num_controlled=0)
        _score(world, tmp_path / "out", config, labels=labels)
        assert [score.f1 for score in read_scores(tmp_path / "out")] == [None, None]
        server.respond = NoisyOracle(0.0)
        _score(world, tmp_path / "out", config)
        assert len(server.requests) == 2
        _score(world, tmp_path / "out", config, retry_failed=True)
        assert len(server.requests) == 4
    assert [score.f1 for score in read_scores(tmp_path / "out")] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line in it"),
        ("[]\n", "line 1: '\\[\\]', needs a JSON object with 'feature' and 'label'"),
        ('{"feature": 1}\n', "needs a JSON object with 'feature' and 'label'"),
        ('{"feature": 99, "label": "x"}\n', "feature 99, the dictionary has 0 to 10"),
        ('{"feature": 1, "label": "x"}\n{"feature": 1, "label": "y"}\n', "line 2: a second label"),
        ('{"feature": "one", "label": "x"}\n', "line 1"),
    ],
    ids=["empty", "no object", "no label", "no such feature", "twice", "no index"],
)
def test_bad_files_of_labels_are_refused(world, tmp_path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    config = LabelConfig.parse({**OFFLINE, "llm": {"model": "m", "base_url": "http://127.0.0.1:9/v1"}})
    with pytest.raises(ConfigError, match=message):
        _score(world, tmp_path / "out", config, labels=tmp_path / "x.jsonl")
    assert not (tmp_path / "out").exists()


def test_folder_of_other_documents_and_runs_without_judge_or_labels_are_refused(world, tmp_path) -> None:
    labels = _foreign(world, tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="no judge"):
        _score(world, tmp_path / "out", LabelConfig.parse(OFFLINE), labels=labels)
    config = LabelConfig.parse({**OFFLINE, "llm": {"model": "m", "base_url": "http://127.0.0.1:9/v1"}})
    with pytest.raises(ConfigError, match="no labels, needs a folder"):
        _score(world, tmp_path / "out", config)
    with serving(NoisyOracle(0.0)) as server:
        _score(world, tmp_path / "out", _config(server), labels=labels)
    other = FakeView(world.store, world.train.mask)
    with pytest.raises(ConfigError, match="was written with another test"):
        score_labels(world.sae, other, lm=LM, out=tmp_path / "out", config=config)  # type: ignore[arg-type]


def test_label_file_of_our_own_comes_back_whole(world, tmp_path) -> None:
    known = Label(feature=0, labeler="llm:m", label="x", description="long", examples=(3, 4), confidence=0.5)
    (tmp_path / "labels.jsonl").write_text(json.dumps(known.to_dict()) + "\n")
    with serving(NoisyOracle(0.0)) as server:
        _score(world, tmp_path / "out", _config(server), labels=tmp_path / "labels.jsonl")
    assert read_labels(tmp_path / "out") == [known]
