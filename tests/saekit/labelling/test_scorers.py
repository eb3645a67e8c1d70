"""Scorers against a judge whose truth and whose noise are known: what they report is what its closed form says."""

from collections.abc import Callable

import numpy as np
import pytest

from saekit.labelling import Label, Score
from saekit.labelling.scoring.intruder import read_intruders
from saekit.labelling.scoring.summary import summarise_scores, summary_lines
from saekit.labelling.scoring.verdicts import at_rate, wilson
from tests.saekit.labelling.bench import Bench
from tests.saekit.labelling.noisyoracle import BROAD, NARROW, PATTERNS, UNRELATED, NoisyOracle, describe
from tests.saekit.labelling.planted import World
from tests.saekit.labelling.stub import serving

MakeBench = Callable[..., Bench]
STANDARD_ERRORS = 4


def judged(world: World, lab: Bench, oracle: NoisyOracle, labels: dict[str, str]) -> dict[str, Score]:
    """Planted feature -> the score of a label that is `labels[feature]`, by the bench's one scorer."""
    features = [world.feature(name) for name in labels]
    lab.labels.extend(
        Label(feature=feature, labeler="llm:stub", label=label)
        for feature, label in zip(features, labels.values(), strict=True)
    )
    # One question at a time, so that the noise is the same on every run.
    with serving(oracle) as server:
        lab.run(server, features).close()
    found = lab.scores.records or lab.control_scores.records
    return {world.names[score.feature]: score for score in found}


def is_binomial(right: int, trials: int, share: float) -> bool:
    return abs(right - trials * share) <= STANDARD_ERRORS * np.sqrt(trials * share * (1 - share)) + 1e-9


@pytest.mark.parametrize("flip", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_noisy_judge_scores_its_closed_form(world, bench: MakeBench, scorer: str, flip: float) -> None:
    lab = bench(num_judged=60, scorers=[scorer], concurrency=1)
    scores = judged(world, lab, NoisyOracle(flip), {name: describe(PATTERNS[name]) for name in PATTERNS})
    right = [verdict for score in scores.values() for verdict in score.right]
    assert len(right) >= 150
    assert is_binomial(sum(right), len(right), 1 - flip)
    for score in scores.values():
        assert (score.scorer, score.judge, score.base_rate, score.num_unparsed) == (scorer, "stub", 0.5, 0)
        error = STANDARD_ERRORS * np.sqrt(flip * (1 - flip) / score.num_positive) + 1e-9
        assert score.balanced_accuracy == pytest.approx(1 - flip, abs=error)
        assert score.f1 == pytest.approx(1 - flip, abs=error)
        assert score.auprc == pytest.approx((1 - flip) ** 2 + flip / 2, abs=2 * error)
        assert score.low <= score.f1 <= score.high
        # At the natural rate the false alarms among many more negatives count.
        rate = score.natural_rate
        f1, auprc = at_rate(score.recall, 2 * (1 - score.balanced_accuracy) - (1 - score.recall), rate)
        assert (score.f1_natural, score.auprc_natural) == (pytest.approx(f1), pytest.approx(auprc))
        if flip == 0.5:
            assert score.auprc_natural == pytest.approx(rate, abs=0.2)


@pytest.mark.parametrize("flip", [0.0, 0.3, 0.8])
def test_noisy_judge_finds_as_many_intruders_as_its_noise_lets_it(world, bench: MakeBench, flip: float) -> None:
    lab = bench(num_judged=20, scorers=["intruder"], concurrency=1)
    scores = judged(world, lab, NoisyOracle(flip, truth=PATTERNS["river"]), {"river": "never read"})
    (score,) = scores.values()
    assert lab.scores.records == []
    assert score.labeler == "control:no label"
    assert (score.num_positive, score.base_rate, score.f1) == (len(score.right), 0.2, None)
    assert score.num_positive >= 5
    assert is_binomial(sum(score.right), score.num_positive, 1 - flip)
    assert (score.low, score.high) == wilson(sum(score.right), score.num_positive)


@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_better_labels_score_better(world, bench: MakeBench, tmp_path, scorer: str) -> None:
    def mean(name: str, labels: dict[str, str], figure: str = "balanced_accuracy") -> float:
        lab = bench(num_judged=60, scorers=[scorer], concurrency=1).move(tmp_path / name)
        found = judged(world, lab, NoisyOracle(0.1), labels)
        return float(np.mean([getattr(score, figure) for score in found.values()]))

    true = mean("true", {name: describe(PATTERNS[name]) for name in NARROW})
    broad = mean("broad", {name: describe(BROAD[name]) for name in NARROW})
    narrow = mean("narrow", {name: describe(NARROW[name]) for name in NARROW})
    unrelated = mean("unrelated", dict.fromkeys(NARROW, describe(UNRELATED)))
    empty = mean("empty", dict.fromkeys(NARROW, "(none)"))
    assert true == pytest.approx(0.9, abs=0.05)
    assert true > narrow + 0.05 > unrelated + 0.1
    # In fuzzing a broad label errs only where it also fits the wrong marks.
    assert true > broad + 0.03
    assert scorer == "detection" or broad > unrelated + 0.05
    assert unrelated == pytest.approx(0.5, abs=0.1)
    assert empty == pytest.approx(0.5, abs=0.1)


def test_controls_stand_beside_every_scorer_and_score_chance(world, bench: MakeBench) -> None:
    lab = bench(num_judged=60, scorers=["detection", "fuzzing", "intruder"], num_controlled=3, concurrency=1)
    names = list(PATTERNS)
    features = [world.feature(name) for name in names]
    lab.labels.extend(
        Label(feature=feature, labeler="llm:stub", label=describe(PATTERNS[name]))
        for feature, name in zip(features, names, strict=True)
    )
    with serving(NoisyOracle(0.0, truth=PATTERNS["river"])) as server:
        lab.run(server, features).close()
    made = {(score.scorer, score.labeler) for score in lab.control_scores.records}
    assert made == {
        *(
            (scorer, f"control:{name}")
            for scorer in ("detection", "fuzzing")
            for name in ("empty", "random", "shuffled")
        ),
        ("intruder", "control:no label"),
    }
    entries = {
        (entry["scorer"], entry["labeler"]): entry
        for entry in summarise_scores(lab.scores.records, lab.control_scores.records)
    }
    for scorer in ("detection", "fuzzing"):
        assert entries[scorer, "llm:stub"]["balanced_accuracy"] == 1.0
        for name in ("empty", "random", "shuffled"):
            entry = entries[scorer, f"control:{name}"]
            assert (entry["scored"], entry["judge"]) == (3, "stub")
            assert entry["balanced_accuracy"] == pytest.approx(0.5, abs=0.12)
            assert entry["auprc_natural"] == pytest.approx(entry["natural_rate"], abs=0.1)
            low, high = entry["balanced_accuracy_interval"]
            assert low <= entry["balanced_accuracy"] <= high
    lines = summary_lines(list(entries.values()))
    assert any(line.startswith("detection, llm:stub: f1 1.00") for line in lines)
    assert any(line.startswith("intruder, control:no label: accuracy") for line in lines)


def test_controls_are_asked_once_and_found_again(world, bench: MakeBench) -> None:
    options = {"scorers": ["detection", "intruder"], "num_controlled": 2}
    features = [world.feature("river"), world.feature("digit")]
    with serving(NoisyOracle(0.0, truth="x")) as server:
        first = bench(**options)
        first.labels.extend(
            Label(feature=feature, labeler="llm:stub", label=f"words: {feature}") for feature in features
        )
        planned = first.questions(features).requests(first.labels.records)
        first.run(server, features).close()
        asked = len(server.requests)
        assert asked == len(planned) - len(features) == 2 + 2 * 3 + 2
        again = bench(**options)
        again.run(server, features).close()
    assert len(server.requests) == asked
    assert again.control_scores.records == first.control_scores.records


def test_feature_that_fires_too_rarely_is_recorded_all_the_same(world, bench: MakeBench) -> None:
    lab = bench(scorers=["detection", "fuzzing", "intruder"])
    scores = judged(world, lab, NoisyOracle(0.0), {"dead": "never"})
    assert scores["dead"].f1 is None
    assert {score.scorer: (score.num_positive, score.right) for score in lab.scores.records} == {
        "detection": (0, ()),
        "fuzzing": (0, ()),
    }
    assert [(s.scorer, s.accuracy, s.num_positive) for s in lab.control_scores.records] == [("intruder", None, 0)]
    entries = summarise_scores(lab.scores.records, lab.control_scores.records)
    assert [(entry["scored"], entry["without_figures"]) for entry in entries] == [(0, 1)] * 3
    assert summary_lines(entries) == []


@pytest.mark.parametrize(
    ("recall", "false_alarms", "rate", "f1", "auprc"),
    [
        (1.0, 0.0, 0.01, 1.0, 1.0),
        (0.0, 0.0, 0.01, 0.0, 0.01),
        (1.0, 1.0, 0.01, 0.02 / 1.01, 0.01),
        (0.8, 0.2, 0.5, 0.8, 0.8 * 0.8 + 0.2 * 0.5),
        (0.9, 0.1, 0.1, 2 * 0.09 / (0.1 + 0.18), 0.5 * 0.9 + 0.1 * 0.1),
        (0.5, 0.5, 0.0, 0.0, 0.0),
    ],
    ids=["perfect", "never", "always", "balanced", "rare", "nothing positive"],
)
def test_figures_at_a_rate(recall: float, false_alarms: float, rate: float, f1: float, auprc: float) -> None:
    assert at_rate(recall, false_alarms, rate) == (pytest.approx(f1), pytest.approx(auprc))


def test_wilson_interval_is_the_published_one() -> None:
    assert wilson(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"answers": [{"id": 1, "intruder": "c"}, {"id": 2, "intruder": "(A)"}]}', {0: 2, 1: 0}),
        ('{"answers": [{"id": 1, "intruder": "f"}, {"id": 2, "intruder": "ab"}, {"id": 3, "intruder": "a"}]}', {}),
        ('{"answers": [{"id": 1, "intruder": "a"}, {"id": 1, "intruder": "b"}]}', {}),
        ('{"answers": [{"id": 1, "intruder": ""}]}', {}),
        ("none", {}),
    ],
    ids=["good", "no letters", "contradiction", "empty", "prose"],
)
def test_intruders_are_read(text: str, expected: dict[int, int]) -> None:
    assert read_intruders(text, 2) == expected
