"""Two label sets on the same pieces: differences with intervals, McNemar's test, and what cannot be compared."""

from pathlib import Path

import numpy as np
import pytest

from saekit.errors import ConfigError
from saekit.labelling import Label, Score, compare_labels
from saekit.labelling.compare import compare_scores, mcnemar
from saekit.labelling.store import RecordFile
from tests.saekit.labelling.noisyoracle import NARROW, PATTERNS, NoisyOracle, describe
from tests.saekit.labelling.stub import serving


def scored(folder: Path, flip: float, *, labeler: str = "x", seed: int = 0, num_features: int = 40) -> Path:
    generator = np.random.default_rng(seed)
    records = []
    for feature in range(num_features):
        right = generator.random(20) >= flip
        records.append(
            Score(
                feature=feature,
                labeler=labeler,
                scorer="detection",
                judge="m",
                f1=float(right.mean()),
                pieces=tuple(range(20)),
                right=tuple(right.tolist()),
            )
        )
    RecordFile(folder / "scores.jsonl", Score).extend(records)
    return folder


def test_better_set_is_found_with_its_interval(tmp_path) -> None:
    (found,) = compare_labels(scored(tmp_path / "a", 0.4), scored(tmp_path / "b", 0.2, seed=1))
    assert (found.num_features, found.num_pieces, found.judge) == (40, 800, "m")
    assert found.difference == pytest.approx(found.f1_b - found.f1_a)
    assert found.low <= 0.2 <= found.high
    assert found.low > 0.1
    assert found.p_value < 1e-6
    assert found.only_b > 2 * found.only_a
    assert "detection: x" in str(found)


def test_equal_sets_differ_as_often_as_chance_lets_them(tmp_path) -> None:
    p_values, covered = [], 0
    for trial in range(60):
        folders = [scored(tmp_path / f"{trial}{n}", 0.3, seed=100 * n + trial, num_features=12) for n in (1, 2)]
        (found,) = compare_labels(*folders)
        p_values.append(found.p_value)
        covered += found.low <= 0 <= found.high
    assert np.mean(np.array(p_values) < 0.05) <= 0.15
    assert covered >= 50


def test_same_set_has_no_difference(tmp_path) -> None:
    folder = scored(tmp_path / "a", 0.3)
    (found,) = compare_labels(folder, folder, labeler="x")
    assert (found.difference, found.low, found.high, found.only_a, found.p_value) == (0, 0, 0, 0, 1.0)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (5, 5, 1.0), (2, 8, 0.109375)],
)
def test_mcnemar_is_the_exact_binomial(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == pytest.approx(p)


def test_mcnemar_of_many_pieces_is_finite() -> None:
    assert 0 < mcnemar(4_900, 5_100) < 0.05
    assert mcnemar(0, 3_000) == 0.0


def test_other_judges_other_pieces_and_unscored_features_are_not_paired() -> None:
    score = Score(feature=0, labeler="x", scorer="detection", judge="m", f1=0.5, pieces=(1, 2), right=(True, False))
    assert compare_scores([score], [score.model_copy(update={"judge": "other"})]) == []
    assert compare_scores([score], [score.model_copy(update={"f1": None})]) == []
    (found,) = compare_scores([score], [score.model_copy(update={"pieces": (1, 3)})])
    assert (found.num_features, found.num_pieces, found.p_value) == (1, 0, None)


def test_what_cannot_be_compared_is_one_line(tmp_path) -> None:
    a, b = scored(tmp_path / "a", 0.1), scored(tmp_path / "b", 0.1, labeler="y")
    with pytest.raises(ConfigError, match="labelers with scores: x in A, y in B"):
        compare_labels(a, b)
    with pytest.raises(ConfigError, match=r"both .* needs two labelers"):
        compare_labels(a, a)
    with pytest.raises(ConfigError, match="needs one of A too"):
        compare_labels(a, b, other="y")
    with pytest.raises(ConfigError, match="nowhere': no scores in it"):
        compare_labels(a, tmp_path / "nowhere", labeler="x")
    assert compare_labels(a, b, labeler="x", other="y")[0].labeler_b == "y"


def test_judged_labels_are_compared_on_the_same_pieces(world, bench, tmp_path) -> None:
    for name, patterns in (("narrow", NARROW), ("true", PATTERNS)):
        lab = bench(num_judged=20, scorers=["detection", "fuzzing"], concurrency=1).move(tmp_path / name)
        features = [world.feature(planted) for planted in NARROW]
        lab.labels.extend(
            Label(feature=feature, labeler="llm:stub", label=describe(patterns[planted]))
            for feature, planted in zip(features, NARROW, strict=True)
        )
        with serving(NoisyOracle(0.0)) as server:
            lab.run(server, features).close()
    found = compare_labels(tmp_path / "narrow", tmp_path / "true")
    assert [(one.scorer, one.num_features, one.only_a) for one in found] == [("detection", 2, 0), ("fuzzing", 2, 0)]
    assert all(one.num_pieces == 80 and one.only_b > 5 and one.p_value < 0.05 for one in found)
