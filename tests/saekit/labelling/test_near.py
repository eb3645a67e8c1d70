"""Near negatives of held-out pieces: whose they are, that nothing but the label tells them, and that other figures do not know them."""

from collections import Counter
from collections.abc import Callable

import pytest

from saekit.labelling import Label
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.scoring.fuzzing import Fuzzer
from saekit.labelling.scoring.pieces import PieceTable
from saekit.labelling.scoring.summary import summarise_scores
from saekit.labelling.scoring.verdicts import wilson
from tests.saekit.labelling.bench import Bench
from tests.saekit.labelling.noisyoracle import PATTERNS, NoisyOracle, describe
from tests.saekit.labelling.stub import serving
from tests.saekit.labelling.test_scorers import judged

MakeBench = Callable[..., Bench]


@pytest.mark.parametrize("scorer", [Judge, Fuzzer])
def test_near_negatives_hold_a_siblings_peak_and_no_firing(world, bench: MakeBench, scorer: type) -> None:
    lab = bench(num_judged=10)
    config = lab.config.model_copy(update={"near_share": 1.0})
    feature, sibling = world.feature("quasar"), world.feature("river")
    table = PieceTable(lab.held_out)
    plain = scorer(table, lab.config).pieces(feature)
    pieces = scorer(table, config, siblings={feature: [world.feature("dead"), sibling]}).pieces(feature)
    near = [piece for piece in pieces if piece.is_near]
    num = sum(piece.is_active for piece in pieces)
    assert 0 < len(near) <= num
    # The others are those that would be judged without.
    starts = [piece.start for piece in plain]
    assert sorted(starts) == sorted(piece.start for piece in pieces if not piece.is_near)
    assert len({piece.start for piece in pieces}) == len(pieces)
    for piece in near:
        assert not piece.is_active
        assert not lab.held_out.acts_on(feature, piece.start, piece.stop).any()
        acts = lab.held_out.acts_on(sibling, piece.start, piece.stop)
        assert acts.any()
        assert all(acts[place] for place in piece.marked)
    # Neither length nor number of marks tells them from positives.
    if len(near) == num:
        sides = [[piece for piece in pieces if piece.is_active], near]
        lengths = [Counter((piece.num_tokens, len(piece.marked)) for piece in side) for side in sides]
        assert lengths[0] == lengths[1]


@pytest.mark.parametrize("scorer", ["detection", "fuzzing"])
def test_near_slice_is_reported_apart(world, bench: MakeBench, tmp_path, scorer: str) -> None:
    labels = {"river": describe(PATTERNS["river"])}
    options = {"num_judged": 20, "scorers": [scorer], "concurrency": 1}
    random = judged(world, bench(**options).move(tmp_path / "random"), NoisyOracle(0.0), labels)["river"]
    lab = bench(**options, near_share=0.5).move(tmp_path / "near")
    both = judged(world, lab, NoisyOracle(0.0), labels)["river"]
    assert random.num_near == 0
    assert 0 < both.num_near <= 10
    assert (both.specificity_near, both.f1_near, both.auprc_near) == (1.0, 1.0, 1.0)
    assert (both.near_low, both.near_high) == wilson(both.num_near, both.num_near)
    same = ("f1", "f1_natural", "auprc", "natural_rate", "base_rate", "num_positive", "num_negative", "right")
    assert [getattr(both, name) for name in same] == [getattr(random, name) for name in same]
    assert sorted(both.pieces) == sorted(random.pieces)
    # A judge who calls everything active: chance against both kinds.
    always = bench(**options, near_share=0.5).move(tmp_path / "always")
    found = judged(world, always, NoisyOracle(0.0), {"river": describe(r"\w+|.")})["river"]
    assert (found.specificity_near, found.auprc_near) == (0.0, pytest.approx(0.5))
    (entry,) = summarise_scores([both], [])
    assert entry["auprc_near"] == 1.0


def test_near_negatives_without_a_verdict_count_as_wrong(world, bench: MakeBench) -> None:
    lab = bench(num_judged=4, scorers=["detection"], near_share=1.0, attempts=1)
    (scorer,) = lab.scorers
    feature = world.feature("river")
    pieces = scorer.pieces(feature)
    says = [
        f'{{"id": {n}, "active": {str(piece.is_active).lower()}}}'
        for n, piece in enumerate(pieces, start=1)
        if not piece.is_near
    ]
    lab.labels.extend([Label(feature=feature, labeler="llm:stub", label="x")])
    with serving(lambda *_: '{"answers": [' + ", ".join(says) + "]}") as server:
        lab.run(server, [feature]).close()
    (score,) = lab.scores.records
    assert (score.f1, score.num_unparsed, score.specificity_near) == (1.0, 0, 0.0)
    assert score.num_near == len(pieces) - score.num_positive - score.num_negative > 0
