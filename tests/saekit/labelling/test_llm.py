"""Explaining and judging through a stub server: every feature ends once, honestly, and no answer is paid for twice."""

import asyncio
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saekit.errors import ConfigError, LabelerError
from saekit.labelling import (
    ChatRequest,
    Label,
    LLMConfig,
)
from saekit.labelling.answers import UnusableAnswerError, parse_object
from saekit.labelling.chat import SpentError
from saekit.labelling.estimate import estimate_requests, token_counter
from saekit.labelling.llm import least_explained
from saekit.labelling.scoring.pieces import Piece
from saekit.labelling.scoring.verdicts import Judged, read_answers, score_answers
from tests.saekit.labelling.bench import ANSWER, FIRING, oracle
from tests.saekit.labelling.planted import WordTokenizer
from tests.saekit.labelling.stub import Fault, StubServer, completion, serving


def test_every_feature_is_labelled_and_judged_once(world, bench) -> None:
    lab = bench(num_judged=10)
    features = [world.feature(name) for name in ("river", "digit", "noise")]
    with serving(oracle) as server:
        ledger = lab.run(server, features)
    assert sorted(label.feature for label in lab.labels.records) == sorted(features)
    assert {label.labeler for label in lab.labels.records} == {"llm:stub"}
    assert all(label.status == "done" and label.confidence == 0.9 for label in lab.labels.records)
    assert len(server.requests) == ledger.num_sent == ledger.answered.requests == 6
    assert (ledger.answered.input, ledger.answered.output) == (600, 60)
    scores = {score.feature: score for score in lab.scores.records}
    assert sorted(scores) == sorted(features)
    river = scores[world.feature("river")]
    assert (river.f1, river.balanced_accuracy, river.num_positive, river.num_negative) == (1.0, 1.0, 10, 10)
    assert (river.low, river.high, river.num_unparsed, river.base_rate) == (1.0, 1.0, 0, 0.5)
    assert scores[world.feature("noise")].balanced_accuracy == pytest.approx(0.5, abs=0.3)


def test_second_run_asks_nothing(world, bench) -> None:
    features = [world.feature("river"), world.feature("digit")]
    with serving(oracle) as server:
        bench().run(server, features).close()
        asked = len(server.requests)
        again = bench()
        again.run(server, features).close()
    assert len(server.requests) == asked == 4
    assert len(again.labels.records) == len(again.scores.records) == 2


def test_lost_files_are_written_anew_from_the_ledger(world, bench, tmp_path) -> None:
    with serving(oracle) as server:
        first = bench()
        first.run(server, [0, 2]).close()
        (tmp_path / "labels.jsonl").unlink()
        (tmp_path / "scores.jsonl").unlink()
        again = bench()
        again.run(server, [0, 2])
    assert len(server.requests) == 4
    key = lambda record: record.feature  # noqa: E731
    assert sorted(again.labels.records, key=key) == sorted(first.labels.records, key=key)
    assert sorted(again.scores.records, key=key) == sorted(first.scores.records, key=key)


def _cut(text: str, finish_reason: str = "stop") -> dict[str, object]:
    answer = completion(text)
    answer["choices"][0]["finish_reason"] = finish_reason  # type: ignore[index]
    answer["choices"][0]["message"]["content"] = text or None  # type: ignore[index]
    return answer


def _refused(text: str) -> dict[str, object]:
    answer = _cut("")
    answer["choices"][0]["message"]["refusal"] = text  # type: ignore[index]
    return answer


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (f'<think>maybe {{\'label\'}} {{"label": "no"}}</think>{ANSWER}', "rivers and lakes"),
        ('{"label": "two\nlines", "examples": [1, 2,],}', "two lines"),
        (f"```json\n{ANSWER}\n```", "rivers and lakes"),
        (f"Here you go: {ANSWER} Hope it helps {{smile}}", "rivers and lakes"),
        ('{"label": "  two \\n lines  "}', "two lines"),
        ('{"label": "x", "confidence": "0.4", "promotes": ["a", "b"], "extra": 1}', "x"),
        ('{"note": {"a": 1}} {"label": "y"}', "y"),
    ],
    ids=["thoughts", "loose commas", "fenced", "talk around", "line breaks", "loose types", "second object"],
)
def test_usable_answers_are_read(bench, answer: str, label: str) -> None:
    lab = bench(num_judged=0)
    lab.scorers = []
    with serving(lambda *_: answer) as server:
        lab.run(server, [0])
    assert [(r.status, r.label) for r in lab.labels.records] == [("done", label)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_cut(ANSWER[:20], "length"), "cut off"),
        (_refused("I would rather not."), "the model would not answer: I would rather not."),
        (_cut(""), "empty answer"),
        ("no idea", "no JSON object with 'label'"),
        ('{"label": NaN}', "no JSON object"),
        ('{"label": "  "}', "empty label"),
        ('{"title": "x"}', "no JSON object with 'label'"),
        (Fault(400, error={"message": "too long"}), "too long"),
        (Fault(500), "500"),
    ],
    ids=["length", "refusal", "null", "prose", "nan", "blank", "other key", "refused", "500 for ever"],
)
def test_unusable_answers_end_in_a_failure_with_its_reason(bench, answer, reason: str) -> None:
    lab = bench(max_retries=1)
    lab.scorers = []
    with serving(lambda *_: answer) as server:
        lab.run(server, [0, 1])
    assert [(r.feature, r.status, r.label) for r in sorted(lab.labels.records, key=lambda r: r.feature)] == [
        (0, "failed", ""),
        (1, "failed", ""),
    ]
    assert all(reason in str(r.reason) for r in lab.labels.records)
    assert len(server.requests) <= 24


def test_what_is_whole_of_an_answer_that_stays_cut_off_is_used(bench) -> None:
    lab = bench()
    lab.scorers = []
    with serving(lambda *_: _cut(ANSWER[:60], "length")) as server:
        lab.run(server, [0])
    (label,) = lab.labels.records
    assert (label.status, label.label, label.fires_on) == ("done", "rivers and lakes", "")
    # Both attempts are paid, and stand in the label.
    assert (len(server.requests), label.input_tokens, label.output_tokens) == (2, 200, 20)


def test_cut_off_answer_is_asked_again_with_more_room(bench) -> None:
    lab = bench()
    lab.scorers = []
    with serving(lambda _, n: _cut(ANSWER[:30], "length") if n == 0 else ANSWER) as server:
        lab.run(server, [0])
    assert lab.labels.records[0].status == "done"
    assert [request["max_tokens"] for request in server.requests] == [600, 1200]


def test_wrong_key_stops_at_once_and_labels_nothing(bench) -> None:
    lab = bench(concurrency=4)
    with serving(lambda *_: Fault(401)) as server, pytest.raises(LabelerError, match="check the key"):
        lab.run(server, list(range(11)))
    assert len(server.requests) <= 4
    assert lab.labels.records == []


@pytest.mark.parametrize(
    ("cap", "message", "most"),
    [
        ({"max_requests": 3}, "3 requests sent, max_requests", 3),
        ({"max_tokens": 2600}, "could pass max_tokens 2,600", 7),
        ({"max_cost": 0.0032, "price_input": 1.0, "price_output": 2.0}, "could pass max_cost", 7),
    ],
    ids=["requests", "tokens", "cost"],
)
def test_cap_is_hard_keeps_what_is_paid_and_can_be_raised(
    bench, cap: dict[str, object], message: str, most: int
) -> None:
    with serving(oracle) as server:
        lab = bench(concurrency=3, **cap)
        lab.scorers = []
        with pytest.raises(SpentError, match=message):
            lab.run(server, FIRING)
        paid = len(server.requests)
        assert 1 <= paid <= most
        assert len(lab.labels.records) == paid
        raised = bench()
        raised.scorers = []
        raised.run(server, FIRING)
    assert len(server.requests) == 10
    assert sorted(label.feature for label in raised.labels.records) == FIRING


def test_cap_without_prices_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_cost needs price_input"):
        LLMConfig.parse({"model": "m", "max_cost": 1.0})


def test_works_inside_a_running_event_loop(bench) -> None:
    lab = bench()

    async def notebook(server: StubServer) -> None:
        lab.run(server, [0])

    with serving(oracle) as server:
        asyncio.run(notebook(server))
    assert lab.labels.records[0].status == "done"


def test_estimate_counts_requests_and_does_not_fall_short_of_them(world, bench) -> None:
    lab = bench(price_input=1.0, price_output=2.0)
    features = [0, 2]
    count = token_counter(WordTokenizer())
    estimate = estimate_requests(lab.questions(features).requests(), lab.config, count=count)
    with serving(oracle) as server:
        lab.run(server, features)
    assert estimate.num_requests == len(server.requests) == 4
    words = sum(count(user) for user in server.users())
    assert words <= estimate.input_tokens
    assert estimate.cost == pytest.approx((estimate.input_tokens + 2 * estimate.output_tokens) / 1e6)
    assert estimate.most_cost > estimate.cost
    assert "4 requests" in str(estimate)


def test_explainer_and_judge_read_different_documents(world, bench) -> None:
    lab = bench(num_judged=20)
    for feature in range(len(world.names)):
        shown = lab.explainer.documents_shown(feature)
        judged = {piece.document for piece in lab.judge.pieces(feature)}
        assert shown <= set(world.train.documents.tolist())
        assert judged <= set(world.test.documents.tolist())
        assert not shown & judged
    assert lab.explainer.documents_shown(0)


def test_negatives_are_silent_on_every_token_and_positives_are_not(world, bench) -> None:
    lab = bench(num_judged=20)
    flat_of = lab.held_out.table.rows[:, None] * 64 + np.arange(64)
    for feature in range(len(world.names)):
        pieces = lab.judge.pieces(feature)
        assert sum(piece.is_active for piece in pieces) >= sum(not piece.is_active for piece in pieces)
        for piece in pieces:
            flat = flat_of.reshape(-1)[piece.start : piece.stop]
            assert bool((world.acts[flat, feature] > 0).any()) == piece.is_active
            assert world.test.mask.reshape(-1)[flat].all()
            assert set(world.store.documents().reshape(-1)[flat].tolist()) == {piece.document}


def test_pieces_are_cut_without_regard_to_the_peak(world, bench) -> None:
    # A judge that knew the place of the feature in a piece could answer without the label.
    lab = bench(num_judged=60)
    firing = set(lab.held_out.firings(world.feature("river")).tolist())
    offsets = [
        place - piece.start
        for piece in lab.judge.pieces(world.feature("river"))
        if piece.is_active
        for place in range(piece.start, piece.stop)
        if place in firing
    ]
    assert len(set(offsets)) > 15


def test_marked_tokens_are_the_active_ones(world, bench) -> None:
    lab = bench()
    user = lab.explainer.request(world.feature("river")).user
    marked = re.findall("\u00ab(.*?)\u00bb", user)
    assert marked
    assert set(" ".join(marked).split()) <= {"river", "River", "lake"}


def test_judge_that_says_the_same_to_all_gets_half(world, bench) -> None:
    lab = bench(num_judged=10)
    pieces = lab.judge.pieces(world.feature("river"))
    label = Label(feature=0, labeler="x")
    for verdict in (True, False):
        score = score_answers(label, pieces, dict.fromkeys(range(len(pieces)), verdict), Judged())
        assert score.balanced_accuracy == 0.5


def _piece(is_active: bool, document: int) -> Piece:
    return Piece(start=0, stop=8, document=document, is_active=is_active)


def test_missing_answers_count_as_wrong() -> None:
    pieces = [_piece(True, 0), _piece(True, 1), _piece(False, 2), _piece(False, 3)]
    score = score_answers(Label(feature=0, labeler="x"), pieces, {0: True, 2: False}, Judged())
    assert (score.num_unparsed, score.recall, score.precision, score.balanced_accuracy) == (2, 0.5, 0.5, 0.5)
    assert score.f1 == 0.5
    silent = score_answers(Label(feature=0, labeler="x"), pieces, {}, Judged())
    assert (silent.f1, silent.num_unparsed) == (None, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"answers": [{"id": 1, "active": true}, {"id": 2, "active": false}]}', {0: True, 1: False}),
        ('```{"answers": [{"id": "1", "active": "yes"}]}```', {0: True}),
        ('{"answers": [{"id": 1, "active": true}, {"id": 1, "active": false}]}', {}),
        ('{"answers": [{"id": 1, "active": true}, {"id": 1, "active": true}]}', {0: True}),
        ('{"answers": [{"id": 9, "active": true}, {"id": true, "active": true}, 3, {"active": true}]}', {}),
        ('{"answers": "all"}', {}),
        ("none of them", {}),
        ("", {}),
    ],
    ids=["good", "loose", "contradiction", "repeated", "foreign ids", "no list", "prose", "empty"],
)
def test_verdicts_are_read(text: str, expected: dict[int, bool]) -> None:
    assert read_answers(text, 2) == expected


def test_noisy_oracle_scores_what_its_noise_allows(world, bench) -> None:
    generator = np.random.default_rng(0)
    pieces = [_piece(bool(i % 2), i) for i in range(4000)]
    answers = {i: piece.is_active ^ bool(generator.random() < 0.2) for i, piece in enumerate(pieces)}
    score = score_answers(Label(feature=0, labeler="x"), pieces, answers, Judged())
    assert score.balanced_accuracy == pytest.approx(0.8, abs=0.02)
    assert score.f1 == pytest.approx(0.8, abs=0.02)
    assert score.low < 0.8 < score.high


def test_objects_are_found_in_talk() -> None:
    assert parse_object('x {"a": 1} {"b": {"c": 2}}', needs="b") == {"b": {"c": 2}}
    with pytest.raises(UnusableAnswerError):
        parse_object('{"a": 1', needs="a")


def test_key_of_a_request_changes_with_everything_it_depends_on() -> None:
    base = {
        "model": "m",
        "system": "s",
        "user": "u",
        "schema_name": "n",
        "schema": {},
        "temperature": 0.0,
        "max_output_tokens": 9,
    }
    others = [
        {"model": "m2"},
        {"system": "s2"},
        {"user": "u2"},
        {"schema_name": "n2"},
        {"schema": {"type": "object"}},
        {"temperature": 0.5},
        {"max_output_tokens": 10},
        {"attempt": 1},
    ]
    keys = {ChatRequest(**{**base, **change}).key() for change in [{}, *others]}
    assert len(keys) == len(others) + 1


def test_least_explained_features_come_first() -> None:
    confidence = {3: 0.9, 5: 0.1, 7: 0.5, 9: 0.1}
    assert least_explained(confidence, num=3) == [5, 7, 9]
    assert least_explained(confidence, num=None) == [3, 5, 7, 9]


_PROMPTS = """
import tempfile
from types import SimpleNamespace
from saekit.labelling import ContextConfig, Label, LLMConfig, RuleScoringConfig, collect_contexts
from saekit.labelling.examples import ExampleReader
from saekit.labelling.explain import Explainer
from saekit.labelling.scoring.rule import HeldOut
from saekit.labelling.scoring.scorers import make_scorers
from saekit.labelling.vocabulary import Vocabulary
from tests.saekit.labelling.planted import WordTokenizer, make_world
world, vocabulary = make_world(60), Vocabulary(WordTokenizer())
config = LLMConfig(model="m", scorers=("detection", "fuzzing", "intruder"))
contexts = collect_contexts(world.sae, world.train, config=ContextConfig(), out=tempfile.mkdtemp())
explainer = Explainer(ExampleReader(world.store, vocabulary), contexts, config)
held_out = HeldOut(world.sae, world.test, vocabulary, config=RuleScoringConfig())
scorers = make_scorers(held_out, config)
for feature in range(len(world.names)):
    print(explainer.request(feature).key() if contexts.firing_count[feature] else "none")
    for scorer in scorers:
        label = Label(feature=feature, labeler="x", label="y")
        print(*(request.key() for request in scorer.requests(label, scorer.pieces(feature))))
"""


def test_prompts_are_the_same_in_every_process() -> None:
    root = str(Path(__file__).parents[3])
    other = subprocess.run(
        [sys.executable, "-c", _PROMPTS],
        # Another one than this process has, whether by chance or by its own environment.
        env={
            "PYTHONHASHSEED": "4711" if os.environ.get("PYTHONHASHSEED") != "4711" else "0",
            "PYTHONPATH": f"{root}:{root}/kernels",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
        },
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(_PROMPTS, {})
    assert here.getvalue() == other
    assert len(other.split()) == 44
