"""One probe for each way in which a published labeller's score was seen to rise, or a feature to vanish, without a good label."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from saekit.labelling import Label
from saekit.labelling.examples import feature_examples
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.scoring.fuzzing import Fuzzer
from saekit.labelling.scoring.intruder import GROUP, IntruderJudge
from saekit.labelling.scoring.pieces import Piece, PieceTable
from saekit.labelling.scoring.summary import summarise_scores
from saekit.labelling.scoring.verdicts import Judged, score_answers
from tests.saekit.labelling.bench import FIRING, Bench
from tests.saekit.labelling.noisyoracle import BROAD, NARROW, PATTERNS, NoisyOracle, describe
from tests.saekit.labelling.planted import World
from tests.saekit.labelling.stub import serving
from tests.saekit.labelling.test_scorers import judged

MakeBench = Callable[..., Bench]
SCORERS = [Judge, Fuzzer, IntruderJudge]


@pytest.fixture
def lab(bench: MakeBench) -> Bench:
    return bench(num_judged=40)


def asked(lab: Bench, scorer: type, feature: int) -> list[Piece]:
    return scorer(PieceTable(lab.held_out), lab.config).pieces(feature)


def share_right(pieces: list[Piece], rule: Callable[[Piece], bool]) -> float:
    return float(np.mean([rule(piece) == piece.is_active for piece in pieces]))


@pytest.mark.parametrize("scorer", SCORERS)
def test_test_set_is_not_in_the_explainers_prompt(world: World, lab: Bench, scorer: type) -> None:
    # delphi drew the explained and the judged contexts from one list.
    for feature in FIRING:
        shown = lab.explainer.documents_shown(feature)
        pieces = asked(lab, scorer, feature)
        assert not shown & {piece.document for piece in pieces}
        assert {piece.document for piece in pieces} <= set(world.test.documents.tolist())


@pytest.mark.parametrize("feature", FIRING)
def test_marks_alone_tell_nothing(lab: Bench, feature: int) -> None:
    # delphi marked token 24 of 32 in every negative: a rule on that place alone scored 0.9.
    pieces = asked(lab, Fuzzer, feature)
    right, wrong = ([p for p in pieces if p.is_active == side] for side in (True, False))
    assert len(right) == len(wrong)
    patterns = [Counter((p.marked, p.num_tokens) for p in side) for side in (right, wrong)]
    assert patterns[0] == patterns[1]
    rules: list[Callable[[Piece], bool]] = [
        *(lambda p, place=place: place in p.marked for place in range(32)),
        *(lambda p, num=num: len(p.marked) > num for num in range(6)),
        lambda p: p.num_tokens == 32,
        lambda p: p.marked[0] < 12,
    ]
    assert not pieces or all(share_right(pieces, rule) == 0.5 for rule in rules)


def test_wrong_marks_stand_on_silent_tokens_and_right_ones_on_active_tokens(world: World, lab: Bench) -> None:
    for feature in FIRING:
        firing = set(lab.held_out.firings(feature).tolist())
        for piece in asked(lab, Fuzzer, feature):
            at = {piece.start + offset for offset in piece.marked}
            assert at
            assert at <= firing if piece.is_active else not at & firing


def test_topic_alone_does_not_tell_right_marks_from_wrong(lab: Bench, world: World) -> None:
    # A judge who never looks at the marks would pass if wrong marks stood in silent texts only.
    feature = world.feature("quasar")
    firing = lab.held_out.firings(feature)
    pieces = asked(lab, Fuzzer, world.feature("river"))
    river = lab.held_out.firings(world.feature("river"))
    assert len(firing)
    hard = [p for p in pieces if not p.is_active and ((river >= p.start) & (river < p.stop)).any()]
    assert len(hard) >= len(pieces) / 8


@pytest.mark.parametrize("feature", FIRING)
def test_length_alone_tells_nothing(lab: Bench, feature: int) -> None:
    # Longer pieces are active more often.
    pieces = asked(lab, Judge, feature)
    lengths = [Counter(p.num_tokens for p in pieces if p.is_active == side) for side in (True, False)]
    assert lengths[0] == lengths[1]
    groups = asked(lab, IntruderJudge, feature)
    assert {piece.num_tokens for piece in groups} <= {32}


def test_number_of_positives_is_not_in_the_prompt(lab: Bench, world: World) -> None:
    # SAEBench's worked example always named as many texts as were active.
    label = Label(feature=0, labeler="x", label="y")
    table = PieceTable(lab.held_out)
    for scorer in (Judge, Fuzzer):
        one = scorer(table, lab.config)
        pieces = one.pieces(0)
        flipped = [Piece(start=p.start, stop=p.stop, document=0, is_active=True, marked=p.marked) for p in pieces]
        assert one.request(label, pieces) == one.request(label, flipped)


@pytest.mark.parametrize("says", [True, False], ids=["all", "none"])
@pytest.mark.parametrize("scorer", [Judge, Fuzzer])
def test_judge_who_says_the_same_to_all_gets_half_and_no_average_precision(lab: Bench, scorer, says: bool) -> None:
    # SAEBench gave 0.714 to a judge who said "none".
    pieces = asked(lab, scorer, 0)
    score = score_answers(
        Label(feature=0, labeler="x"), pieces, dict.fromkeys(range(len(pieces)), says), Judged(natural_rate=0.01)
    )
    assert (score.balanced_accuracy, score.auprc, score.auprc_natural) == (0.5, 0.5, pytest.approx(0.01))
    assert score.f1_natural == pytest.approx(0.02 / 1.01 if says else 0.0)


def test_place_of_the_intruder_tells_nothing(world: World, bench: MakeBench) -> None:
    places: Counter[int] = Counter()
    for seed in range(12):
        lab = bench(num_judged=40, seed=seed)
        for feature in (world.feature("river"), world.feature("digit")):
            pieces = asked(lab, IntruderJudge, feature)
            assert [sum(not p.is_active for p in pieces[i : i + GROUP]) for i in range(0, len(pieces), GROUP)] == [
                1
            ] * (len(pieces) // GROUP)
            places.update(number % GROUP for number, piece in enumerate(pieces) if not piece.is_active)
    total = sum(places.values())
    assert total > 200
    assert all(abs(places[place] - total / GROUP) < 4 * np.sqrt(total * 0.16) for place in range(GROUP))


@pytest.mark.parametrize("scorer", SCORERS)
def test_no_piece_is_shown_twice(lab: Bench, scorer: type) -> None:
    # Four texts that come back in every group would leave the fifth as the intruder.
    for feature in FIRING:
        starts = [piece.start for piece in asked(lab, scorer, feature)]
        assert len(starts) == len(set(starts))


def test_context_shared_by_two_features_is_kept_for_both(lab: Bench) -> None:
    # Neuronpedia's importer dropped a text for every feature but the first.
    shown = [
        {example.flat for example in feature_examples(lab.explainer._evidence._reader, lab.contexts, feature)}
        for feature in FIRING
    ]
    assert any(one & other for n, one in enumerate(shown) for other in shown[n + 1 :])
    assert all(len(one) == min(84, len(one)) > 0 for one in shown)


@pytest.mark.parametrize("worse", [BROAD, NARROW], ids=["extra labels", "missing labels"])
def test_worse_labels_lower_every_figure_that_is_reported(
    world: World, bench: MakeBench, tmp_path, worse: dict[str, str]
) -> None:
    def scores(name: str, patterns: dict[str, str]) -> dict:
        lab = bench(num_judged=60, scorers=["detection"], concurrency=1).move(tmp_path / name)
        return judged(world, lab, NoisyOracle(0.0), {name: describe(patterns[name]) for name in worse})

    good, bad = scores("good", PATTERNS), scores("bad", worse)
    for name in worse:
        for figure in ("f1", "auprc", "f1_natural", "auprc_natural"):
            assert getattr(bad[name], figure) < getattr(good[name], figure)


def test_unusable_answers_stay_in_the_mean_and_failures_are_not_judged(world: World, bench: MakeBench) -> None:
    # SAEBench dropped such features from the mean; delphi judged the text of an error message.
    lab = bench(num_judged=10, scorers=["detection"], attempts=1)
    lab.labels.extend(
        [
            Label(feature=0, labeler="llm:stub", label="x"),
            Label(feature=2, labeler="llm:stub", status="failed", reason="could not be parsed"),
        ]
    )
    half = '{"answers": [{"id": 1, "active": true}, {"id": 2, "active": true}]}'
    with serving(lambda *_: half) as server:
        lab.run(server, [0, 2]).close()
    (score,) = lab.scores.records
    assert (score.feature, score.num_unparsed, len(score.right)) == (0, 18, 20)
    assert score.balanced_accuracy <= 0.1
    (entry,) = summarise_scores(lab.scores.records, [])
    assert (entry["scored"], entry["unparsed"]) == (1, 18)
