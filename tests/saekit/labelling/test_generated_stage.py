"""Scorers of generated texts through the label stage and `score_labels`: estimated to the request, capped, and resumed after a kill."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from saekit.activations import CacheConfig, StoreView, cache_activations
from saekit.errors import LabelerError
from saekit.labelling import (
    LabelConfig,
    LLMEstimate,
    compare_labels,
    estimate_labels,
    estimate_scores,
    label_features,
    read_controls,
    read_labels,
    read_scores,
    score_labels,
)
from saekit.manifest import read_manifest
from saekit.models import LanguageModel, find_unembedding, load_model
from saekit.sae import SAE, TopKConfig, TopKSAE
from tests.saekit.labelling.bench import ANSWER, oracle
from tests.saekit.labelling.inprocess import InProcess
from tests.saekit.labelling.stub import StubServer, serving
from tests.saekit.labelling.test_kill import _is_gone, _kill, recorded, running

HOOK = "model.layers.1"
STEERED = {"prompts": ["We"], "kl_targets": [0.5], "num_samples": 1, "num_tokens": 3, "num_trials": 2, "batch_rows": 2}
LLM: dict[str, object] = {
    "model": "stub",
    "max_features": 3,
    "num_controlled": 2,
    "num_judged": 2,
    "scorers": ["input", "output"],
    "steered": STEERED,
    "input_test": {"num_sentences": 2},
    "concurrency": 2,
    "wait_seconds": 0.001,
}


def answers(body: dict[str, object], number: int) -> str:
    """Sensible answers, and a label of its own for every feature."""
    user = str(body["messages"][1]["content"])  # type: ignore[index]
    if "Pieces:" in user:
        return oracle(body, number)
    if "sentences of each kind" in user:
        return json.dumps({"activating": ["We say", "so it is"], "neutral": ["one", "two"]})
    if "\n\nSet 1\n" in user:
        return '{"set": 1}'
    if "\n\nPairs:\n" in user:
        return json.dumps(
            {"answers": [{"id": int(n), "text": "a"} for n in re.findall(r"^(\d+)$", user, re.MULTILINE)]}
        )
    return ANSWER.replace("rivers", f"rivers {sum(user.encode())}")


@dataclass
class Subject:
    """A model, a dictionary and documents; what a run needs beside its config."""

    lm: LanguageModel
    sae: SAE
    train: StoreView
    test: StoreView

    def config(self, **llm: object) -> LabelConfig:
        return LabelConfig.parse({"vocab_projection": False, "token_change": None, "llm": {**LLM, **llm}})

    def label(self, out: Path, client: InProcess | None, **llm: object) -> None:
        config = self.config(**llm)
        label_features(self.sae, self.train, test=self.test, lm=self.lm, out=out, config=config, client=client)

    def estimate(self, out: Path, **llm: object) -> LLMEstimate:
        config = self.config(**llm)
        return estimate_labels(self.sae, self.train, test=self.test, lm=self.lm, out=out, config=config)


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Callable[[str], Path], documents_file: Path, tmp_path_factory) -> Subject:
    lm = load_model(str(tiny_model_dir("llama")))
    with torch.no_grad():
        # Logits as far apart as a trained model's, so that it can be moved.
        find_unembedding(lm).weight.mul_(20)
    values = {
        "model": {"name": lm.name},
        "text": {"kind": "files", "paths": [str(documents_file)]},
        "tokens": {"context_len": 32},
        "hook_points": [HOOK],
        "num_tokens": 700,
    }
    store = cache_activations(CacheConfig.parse(values), tmp_path_factory.mktemp("cache") / "cache", lm=lm)
    train, test = store.split(0.3)
    sae = TopKSAE(TopKConfig(d_in=store.d_in, d_sae=8, k=2), hook_point=HOOK, seed=1)
    return Subject(lm=lm, sae=sae, train=train, test=test)


def _texts(folder: Path) -> list[int]:
    """Features whose texts are in a folder."""
    path = folder / "steered.jsonl"
    return [json.loads(line)["feature"] for line in path.read_bytes().splitlines()] if path.exists() else []


def test_a_dry_run_counts_what_is_sent_and_the_cap_holds(subject: Subject, tmp_path: Path) -> None:
    estimate, judge = subject.estimate(tmp_path), InProcess(answers)
    assert _texts(tmp_path)
    written = (tmp_path / "steered.jsonl").read_bytes()
    # Each answer of the judge costs 120e-6 dollars, and could cost up to 3e-3.
    priced, cap = {"price_input": 1.0, "price_output": 2.0}, 4e-3
    with pytest.raises(LabelerError, match="max_cost"):
        subject.label(tmp_path, judge, **priced, max_cost=cap)
    assert 0 < 120e-6 * len(judge.requests) <= cap
    with pytest.raises(LabelerError, match="max_requests"):
        subject.label(tmp_path, judge, **priced, max_requests=estimate.num_requests - 1)
    assert len(judge.requests) == estimate.num_requests - 1
    subject.label(tmp_path, judge, **priced)
    assert len(judge.requests) == len({str(body) for body in judge.requests}) == estimate.num_requests
    assert (tmp_path / "steered.jsonl").read_bytes() == written
    scores, controls = read_scores(tmp_path), read_controls(tmp_path)
    assert {score.scorer for score in scores} == {"rule", "input", "output"}
    assert {score.scorer for score in controls} == {"input", "output"}
    assert all(score.setup for score in (*scores, *controls) if score.scorer != "rule")
    report = json.loads((tmp_path / "label_report.json").read_text())
    assert report["llm"]["requests_sent"] == estimate.num_requests
    means = {entry["scorer"]: entry for entry in report["scores"] if entry["labeler"] == "llm:stub"}
    assert means["output"]["accuracy"] == pytest.approx(
        sum(s.accuracy for s in scores if s.scorer == "output") / 3  # type: ignore[misc]
    )
    assert {"auprc", "f1", "accuracy"} <= means["input"].keys()


def test_killed_in_the_middle_of_steered_texts_it_goes_on_from_there(subject: Subject, tmp_path: Path) -> None:
    def work(line: str) -> None:
        # Threads of the parent are not in a fork.
        torch.set_num_threads(1)
        config = subject.config(base_url=line)
        label_features(subject.sae, subject.train, test=subject.test, lm=subject.lm, out=tmp_path, config=config)

    def until(is_enough: Callable[[], bool], runner, server: StubServer) -> None:
        pid = runner.start(server.url)
        while not is_enough():
            assert not _is_gone(pid), "the run ended before it was killed"
            time.sleep(0.0005)
        _kill(pid)
        runner.wait()
        assert read_manifest(tmp_path).status == "running"  # type: ignore[union-attr]

    with running(work) as runner, serving(lambda body, n: (time.sleep(0.004), answers(body, n))[1]) as server:
        until(lambda: len(_texts(tmp_path)) > 0, runner, server)
        assert not server.requests
        kept = (tmp_path / "steered.jsonl").read_bytes()
        num_kept = len(_texts(tmp_path))
        until(lambda: len(server.requests) >= 6, runner, server)
        num_known, before = len(recorded(tmp_path)), len(server.requests)
        runner.start(server.url)
        assert runner.wait() == 0
    features = _texts(tmp_path)
    assert 0 < num_kept < len(features) == len(set(features))
    assert (tmp_path / "steered.jsonl").read_bytes().startswith(kept)
    reference = InProcess(answers)
    subject.label(tmp_path / "whole", reference)
    assert num_known + len(server.requests) - before == len(reference.requests)
    assert sorted(read_scores(tmp_path), key=str) == sorted(read_scores(tmp_path / "whole"), key=str)


def test_labels_that_are_there_are_scored_and_compared_on_generated_texts(subject: Subject, tmp_path: Path) -> None:
    subject.label(tmp_path, InProcess(answers), scorers=["detection"], judge_lexical=True)
    asked: dict[str, object] = {"scorers": ["input", "output", "intervention"], "intervention_form": "choice"}
    views = {"lm": subject.lm, "out": tmp_path, "config": subject.config(**asked, max_requests=500)}
    views["labelers"] = ["lexical", "llm:stub"]
    estimate, judge = estimate_scores(subject.sae, subject.test, **views), InProcess(answers)
    score_labels(subject.sae, subject.test, client=judge, **views)
    assert len(judge.requests) == estimate.num_requests > 0
    score_labels(subject.sae, subject.test, client=judge, **views)
    assert len(judge.requests) == estimate.num_requests
    assert estimate_scores(subject.sae, subject.test, **views).num_requests == 0
    scores = [score for score in read_scores(tmp_path) if score.scorer in {"input", "output", "intervention"}]
    there = {(label.feature, label.labeler) for label in read_labels(tmp_path)}
    assert {(score.feature, score.labeler) for score in scores} <= there
    found = {
        comparison.scorer for comparison in compare_labels(tmp_path, tmp_path, labeler="lexical", other="llm:stub")
    }
    assert {"input", "output", "intervention"} <= found
    # Other texts make other scores, in place of those.
    views["config"] = subject.config(**asked, max_requests=500, steered={**STEERED, "num_tokens": 4})
    score_labels(subject.sae, subject.test, client=judge, **views)
    again = [score for score in read_scores(tmp_path) if score.scorer in {"input", "output", "intervention"}]
    assert len(again) == len(scores)
    assert {score.setup for score in again}.isdisjoint({score.setup for score in scores})
