"""Simulation: closed forms of a noisy judge, logprobs that are missing or wrong, and each way in which correlations were got wrong."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from saekit.labelling import Label, Score
from saekit.labelling.chat import Answer, ChatReply
from saekit.labelling.logprobs import TokenLogprob
from saekit.labelling.scoring.correlation import calibrated_r2, pearson, pearson_interval
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.scoring.simulated import read_placeholders, written_values
from saekit.labelling.scoring.simulation import Simulator
from saekit.labelling.scoring.summary import summarise_scores, summary_lines
from tests.saekit.labelling.bench import Bench
from tests.saekit.labelling.noisyoracle import BROAD, NARROW, PATTERNS, UNRELATED, describe
from tests.saekit.labelling.simulator import Simulating
from tests.saekit.labelling.stub import StubServer, serving

MakeBench = Callable[..., Bench]
NAMES = ("river", "digit")


def simulate(
    bench: MakeBench, world, oracle: object, labels: dict[str, str], folder, **options: object
) -> tuple[dict[str, Score], StubServer]:
    lab = bench(num_simulated=20, scorers=["simulation"], concurrency=1, **options).move(folder)
    features = [world.feature(name) for name in labels]
    lab.labels.extend(
        Label(feature=feature, labeler="llm:stub", label=label)
        for feature, label in zip(features, labels.values(), strict=True)
    )
    with serving(oracle) as server:  # type: ignore[arg-type]
        lab.run(server, features).close()
    return {world.names[score.feature]: score for score in lab.scores.records}, server


def tokens_of(lab: Bench, feature: int) -> tuple[np.ndarray, np.ndarray]:
    """True activations on the pieces, and whether the feature fires."""
    table = PieceTable(lab.held_out)
    pieces = Simulator(table, lab.config).pieces(feature)
    true = np.concatenate([lab.held_out.acts_on(feature, p.start, p.stop) for p in pieces]).astype(np.float64)
    return true, true > 0


def closed_form(lab: Bench, feature: int, flip: float) -> float:
    """Correlation of the activations with whether the feature fires, each verdict turned around with probability `flip`."""
    true, fires = tokens_of(lab, feature)
    rate = fires.mean()
    said = rate * (1 - flip) + (1 - rate) * flip
    covariance = (1 - 2 * flip) * np.cov(fires, true, bias=True)[0, 1]
    return float(covariance / np.sqrt(said * (1 - said) * true.var()))


def weighted(lab: Bench, feature: int, rate: float, flip: float) -> float:
    """The same where a share `rate` of the pieces is active."""
    true, fires = tokens_of(lab, feature)
    pieces = Simulator(PieceTable(lab.held_out), lab.config).pieces(feature)
    active = np.array([piece.is_active for piece in pieces])
    weight = np.where(active, rate / active.sum(), (1 - rate) / (~active).sum())
    weight = np.repeat(weight, [piece.num_tokens for piece in pieces])
    share, mean = np.average(fires, weights=weight), np.average(true, weights=weight)
    said = share * (1 - flip) + (1 - share) * flip
    covariance = (1 - 2 * flip) * (np.average(fires * true, weights=weight) - share * mean)
    return float(covariance / np.sqrt(said * (1 - said) * np.average((true - mean) ** 2, weights=weight)))


TRUE = {name: describe(PATTERNS[name]) for name in NAMES}


@pytest.mark.parametrize("flip", [0.0, 0.2, 0.5])
def test_noisy_judge_scores_its_closed_form(world, bench: MakeBench, tmp_path, flip: float) -> None:
    scores, _ = simulate(bench, world, Simulating(flip), TRUE, tmp_path)
    lab = bench(num_simulated=20)
    for name, score in scores.items():
        num = len(tokens_of(lab, world.feature(name))[0])
        expected = closed_form(lab, world.feature(name), flip)
        assert score.pearson == pytest.approx(expected, abs=1e-9 if flip == 0 else 4 / np.sqrt(num))
        assert score.pearson_low <= score.pearson <= score.pearson_high
        assert (score.judge, score.prompt_version, score.num_unparsed) == ("stub", "simulate_v1", 0)
        assert score.r2 <= score.pearson**2 + 0.02
        assert score.pearson_natural == pytest.approx(
            weighted(lab, world.feature(name), score.natural_rate, flip), abs=0.15
        )
        assert len(score.right) == len(score.pieces) == score.num_positive + score.num_negative
        assert score.auprc == pytest.approx(1.0) if flip == 0 else score.auprc < 1


def test_expectation_undoes_noise_and_a_judge_who_knows_nothing_has_no_correlation(
    world, bench: MakeBench, tmp_path
) -> None:
    lab = bench(num_simulated=20)
    sure, server = simulate(bench, world, Simulating(0.2, logprobs="good"), TRUE, tmp_path / "sure")
    for name, score in sure.items():
        # 8 against 2 in place of 10 against 0: another line through the same points.
        assert score.pearson == pytest.approx(closed_form(lab, world.feature(name), 0.0), abs=1e-4)
    assert all(request["top_logprobs"] == 20 for request in server.requests)
    coin, _ = simulate(bench, world, Simulating(0.5, logprobs="good"), TRUE, tmp_path / "coin")
    for score in coin.values():
        # Reported as undefined, and neither as 0 nor as a feature that was never scored.
        assert (score.pearson, score.pearson_low, score.pearson_natural) == (None, None, None)
        assert score.r2 == pytest.approx(0.0, abs=1e-9)
        assert score.auprc == pytest.approx(score.base_rate)
    (entry,) = summarise_scores([sure["river"], coin["digit"]], [])
    assert (entry["scored"], entry["pearson_undefined"]) == (2, 1)
    assert entry["pearson"] == sure["river"].pearson
    assert "correlation undefined for 1" in summary_lines([entry])[0]


def test_better_labels_score_better(world, bench: MakeBench, tmp_path) -> None:
    def mean(name: str, labels: dict[str, str]) -> float:
        scores, _ = simulate(bench, world, Simulating(0.0), labels, tmp_path / name)
        return float(np.mean([score.pearson for score in scores.values()]))

    true = mean("true", TRUE)
    broad = mean("broad", {name: describe(BROAD[name]) for name in NAMES})
    narrow = mean("narrow", {name: describe(NARROW[name]) for name in NAMES})
    unrelated = mean("unrelated", dict.fromkeys(NAMES, describe(UNRELATED)))
    empty = mean("empty", dict.fromkeys(NAMES, ""))
    assert true > 0.8 > max(broad, narrow) > min(broad, narrow) > 0.15
    assert abs(unrelated) < 0.1
    assert abs(empty) < 0.1


@pytest.mark.parametrize("logprobs", [None, "null", "other", "short", "split"])
def test_logprobs_that_cannot_be_used_leave_what_is_written(
    world, bench: MakeBench, tmp_path, logprobs: str | None
) -> None:
    told: list[str] = []
    scores, server = simulate(bench, world, Simulating(0.0, logprobs=logprobs), TRUE, tmp_path)
    assert not told
    lab = bench(num_simulated=20)
    for name, score in scores.items():
        assert score.pearson == pytest.approx(closed_form(lab, world.feature(name), 0.0), abs=1e-6)
        assert score.num_unparsed == 0
    assert len(server.requests) == len(scores)


def test_controls_stand_beside_simulation(world, bench: MakeBench, tmp_path) -> None:
    lab = bench(num_simulated=10, scorers=["simulation"], concurrency=1, num_controlled=2).move(tmp_path)
    lab.labels.extend(Label(feature=world.feature(n), labeler="llm:stub", label=TRUE[n]) for n in NAMES)
    with serving(Simulating(0.0)) as server:
        lab.run(server, [world.feature(name) for name in NAMES]).close()
    found = {}
    for score in lab.control_scores.records:
        found.setdefault(score.labeler, []).append(score.pearson or 0.0)
    assert sorted(found) == ["control:empty", "control:random", "control:shuffled"]
    assert all(abs(np.mean(values)) < 0.2 for values in found.values())
    assert np.mean([score.pearson for score in lab.scores.records]) > 0.8


@pytest.mark.parametrize("reads", ["echo", "prompt_logprobs"])
def test_all_at_once_reads_the_expectation_at_placeholders(world, bench: MakeBench, tmp_path, reads: str) -> None:
    scores, server = simulate(bench, world, Simulating(0.2, reads=reads), TRUE, tmp_path, simulation_form="all_at_once")
    lab = bench(num_simulated=20)
    for name, score in scores.items():
        assert score.pearson == pytest.approx(closed_form(lab, world.feature(name), 0.0), abs=1e-4)
        assert score.prompt_version == "simulate_once_v1"
    # One probe, or two where the first way was passed over, and one text for each label.
    assert len(server.requests) == len(scores) + (1 if reads == "echo" else 2)
    assert all("prompt" in request for request in server.requests)


@pytest.mark.parametrize("reads", [None, 404, 501])
def test_server_that_reads_nothing_is_asked_in_writing(world, bench: MakeBench, tmp_path, reads: int | None) -> None:
    scores, server = simulate(bench, world, Simulating(0.0, reads=reads), TRUE, tmp_path, simulation_form="all_at_once")
    assert [score.prompt_version for score in scores.values()] == ["simulate_v1"] * 2
    assert all(score.pearson > 0.8 for score in scores.values())
    # Seen once at the start, not for each feature.
    assert sum("prompt" in request for request in server.requests) <= 6


def _reply(text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> ChatReply:
    return ChatReply(text=text, finish_reason="stop", input_tokens=1, output_tokens=1, logprobs=logprobs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"1": 0, "2": 10, "3": "7"}', {0: 0, 1: 10, 2: 7}),
        ('Sure:\n```json\n{"1": 3,\n"2": 0}\n```', {0: 3, 1: 0}),
        ('<think>"1": 9</think>{"1": 2, "2": 0}', {0: 2, 1: 0}),
        ('{"1": 0, "2": 3, "3": 1', {0: 0, 1: 3}),
        ('{"1": 11, "2": -1, "3": 2.5, "9": 1}', {2: 2.5}),
        ('{"1": 1, "1": 2, "2": 4, "2": 4}', {1: 4}),
        ("none", {}),
    ],
    ids=["good", "fenced", "thoughts", "cut in a number", "out of range", "contradiction", "prose"],
)
def test_numbers_are_read(text: str, expected: dict[int, float]) -> None:
    assert written_values(_reply(text), 3) == expected


def _token(text: str, **choices: float) -> TokenLogprob:
    return TokenLogprob(text=text, logprob=-1.0, choices={key[1:]: value for key, value in choices.items()})


def test_ten_that_is_two_tokens_is_told_from_one() -> None:
    text = '{"1": 10, "2": 1}'
    tokens = (
        *(_token('{"'), _token("1"), _token('":'), _token(" 1", _1=0.5, _0=0.5), _token("0", _0=0.8), _token(', "')),
        *(_token("2"), _token('":'), _token(" 1", _1=1.0), _token("}", _0=0.25)),
    )
    # 0.5 of a 1 that is a 10 in 0.8 of all cases; a 1 that goes on to be a 10 in a quarter.
    values = written_values(_reply(text, tokens), 2)
    assert values == {0: pytest.approx(0.5 * (0.8 * 10 + 0.2)), 1: pytest.approx(0.25 * 10 + 0.75)}


def test_placeholders_are_found_whatever_the_tokens_around_them() -> None:
    tokens = (
        _token("\ufffd"),
        _token("\t"),
        _token("?\n", _0=0.5, _10=0.5),
        _token("a"),
        _token("\t?", _3=0.2),
        _token("\n"),
    )
    assert read_placeholders(tokens, 2) == {0: pytest.approx(5.0), 1: pytest.approx(3.0)}
    assert read_placeholders(tokens, 3) == {}
    assert read_placeholders((_token("\t"), _token("?"), _token("a\t"), _token("?", _1=1.0)), 2) == {1: 1.0}


def test_tokens_that_break_lines_or_hold_part_of_a_character_stay_one_line_each(world, bench: MakeBench) -> None:
    lab = bench(num_simulated=20, scorers=["simulation"])
    (scorer,) = lab.scorers
    pieces = scorer.pieces(world.feature("river"))
    (request,) = scorer.requests(Label(feature=0, labeler="x", label="a\n1 b"), pieces)
    num = sum(piece.num_tokens for piece in pieces)
    lines = [line for line in request.user.splitlines() if line[:1].isdigit()]
    assert len(lines) == num == len(request.schema["properties"])  # type: ignore[arg-type]
    texts, shown = lab.held_out.table.vocabulary.texts, {}
    kept = texts[10]
    try:
        for texts[10] in ("\n", "\ufffd", "\t?"):
            (shown[texts[10]],) = scorer.requests(Label(feature=0, labeler="x", label="y"), pieces)
    finally:
        texts[10] = kept
    for text, line in {"\n": '"\\n"', "\ufffd": "(part of a character)", "\t?": '"\\t?"'}.items():
        assert f" {line}\n" in shown[text].user
        assert len(shown[text].user.splitlines()) == len(request.user.splitlines())


def test_unusable_piece_counts_as_wrong_and_none_at_all_as_no_figures(world, bench: MakeBench) -> None:
    lab = bench(num_simulated=20, scorers=["simulation"])
    (scorer,) = lab.scorers
    feature = world.feature("river")
    pieces = scorer.pieces(feature)
    label = Label(feature=feature, labeler="x", label="y")
    (request,) = scorer.requests(label, pieces)
    _, fires = tokens_of(lab, feature)
    whole = {str(number): int(10 * hit) for number, hit in enumerate(fires, start=1)}
    half = dict(list(whole.items())[: len(whole) // 2])

    def score(says: object, *, is_last: bool = True) -> Score | None:
        answer = Answer(request=request, reply=_reply(json.dumps(says)))
        return scorer.score(label, pieces, [answer], is_last=is_last)

    best, worse, none = score(whole), score(half), score({})
    assert score(half, is_last=False) is None
    assert worse.num_unparsed >= len(pieces) // 2 - 1
    assert worse.pearson < best.pearson - 0.3
    assert (none.pearson, none.r2, none.right) == (None, None, ())


def test_correlation_is_over_all_tokens_together() -> None:
    # The mean of two texts' own correlations would be 1.
    predicted, true = np.array([0.0, 1.0, 9.0, 10.0]), np.array([5.0, 6.0, 0.0, 1.0])
    ones = np.ones(4)
    assert pearson(predicted, true, ones) == pytest.approx(np.corrcoef(predicted, true)[0, 1])
    assert pearson(predicted, true, ones) < 0
    assert pearson(predicted[:2], true[:2], ones[:2]) == pytest.approx(1.0)
    assert pearson(np.full(4, 3.3), true, ones) is None
    assert pearson(predicted, true, np.array([2.0, 1, 1, 1])) == pytest.approx(
        np.corrcoef(predicted[[0, 0, 1, 2, 3]], true[[0, 0, 1, 2, 3]])[0, 1]
    )


def test_calibration_and_interval() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(size=4000)
    predicted = 3 * (true + generator.normal(size=4000)) + 7
    half = np.arange(4000) % 2 == 0
    # Any scale and offset of predictions is the same; r is 1/sqrt(2).
    assert calibrated_r2(predicted, true, half) == pytest.approx(0.5, abs=0.03)
    assert calibrated_r2(-predicted, true, half) == pytest.approx(calibrated_r2(predicted, true, half))
    assert calibrated_r2(np.full(4000, 2.0), true, half) == pytest.approx(0.0, abs=1e-3)
    assert calibrated_r2(predicted, np.zeros(4000), half) is None
    low, high = pearson_interval(predicted, true, np.arange(4000) // 40, seed=0)
    assert low < 2**-0.5 < high < low + 0.1
    assert pearson_interval(np.full(4000, 0.1), true, np.arange(4000) // 40, seed=0) == (None, None)
