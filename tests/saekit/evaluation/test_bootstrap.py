"""Document bootstrap: coverage, clustering, pairing, undefined statistics."""

import numpy as np
import pytest

from saekit.evaluation.bootstrap import Resampled, Sums, resample_documents


def _ratio(sums: Sums) -> np.ndarray:
    return sums["top"] / sums["bottom"]


def _clustered(rng: np.random.Generator, num_documents: int, per_document: int = 20) -> dict[str, np.ndarray]:
    """Per-document sums of tokens that share their document's level; the true ratio is 1."""
    level = 1 + 0.5 * rng.standard_normal(num_documents)
    tokens = level[:, None] + 0.5 * rng.standard_normal((num_documents, per_document))
    return {"top": tokens.sum(1), "bottom": np.full(num_documents, float(per_document)), "tokens": tokens}


def test_resample_documents_equals_a_plain_loop() -> None:
    sums = np.random.default_rng(0).random((6, 3))
    found = resample_documents(sums, 4, seed=3)
    rng = np.random.default_rng(3)
    expected = [sums[rng.integers(0, 6, size=6)].sum(0) for _ in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_resample_documents_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(0).random((10, 2))
    whole = resample_documents(sums, 50, seed=1)
    monkeypatch.setattr("saekit.evaluation.bootstrap._BLOCK_DRAWS", 35)
    np.testing.assert_allclose(resample_documents(sums, 50, seed=1), whole, rtol=1e-12)


def test_interval_covers_the_truth_at_about_the_nominal_rate() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        sums = _clustered(rng, 60)
        figure = Resampled.of({k: sums[k] for k in ("top", "bottom")}, 400, seed=trial).figure(_ratio)
        assert figure.low is not None
        assert figure.high is not None
        covered += figure.low <= 1.0 <= figure.high
    # 95 % nominal; 300 trials have a standard error of 1.3 %, and a percentile interval of 60 documents is a little short.
    assert 0.90 <= covered / 300 <= 0.985


def test_interval_is_wider_than_one_over_tokens_on_correlated_data() -> None:
    sums = _clustered(np.random.default_rng(1), 80)
    tokens = sums["tokens"].ravel()
    by_document = Resampled.of({k: sums[k] for k in ("top", "bottom")}, 500, seed=0).figure(_ratio)
    by_token = Resampled.of({"top": tokens, "bottom": np.ones(len(tokens))}, 500, seed=0).figure(_ratio)
    assert by_document.value == pytest.approx(by_token.value)
    # Tokens share a level of the same spread as their own noise: theory says sqrt((1 + 1/20) / (2/20)) = 3.2 times.
    assert 2.4 < (by_document.high - by_document.low) / (by_token.high - by_token.low) < 4.2


def test_difference_is_paired_over_documents() -> None:
    """Two rows that share every document's difficulty differ by a constant: the paired interval is (almost) a point."""
    sums = _clustered(np.random.default_rng(2), 40)
    one = Resampled.of({"top": sums["top"], "bottom": sums["bottom"]}, 300, seed=0)
    other = Resampled.of({"top": sums["top"] - 0.25 * sums["bottom"], "bottom": sums["bottom"]}, 300, seed=0)
    difference = one.difference(other, _ratio)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.25, 0.25, 0.25))
    assert one.figure(_ratio).high - one.figure(_ratio).low > 0.05


def test_figure_is_the_same_for_the_same_seed_only() -> None:
    sums = {k: v for k, v in _clustered(np.random.default_rng(3), 30).items() if k != "tokens"}
    assert Resampled.of(sums, 50, seed=1).figure(_ratio) == Resampled.of(sums, 50, seed=1).figure(_ratio)
    assert Resampled.of(sums, 50, seed=1).figure(_ratio) != Resampled.of(sums, 50, seed=2).figure(_ratio)


def test_one_document_has_no_interval() -> None:
    figure = Resampled.of({"top": np.array([3.0]), "bottom": np.array([4.0])}, 100, seed=0).figure(_ratio)
    assert (figure.value, figure.low, figure.high) == (0.75, None, None)


def test_undefined_ratio_is_none() -> None:
    figure = Resampled.of({"top": np.zeros(5), "bottom": np.zeros(5)}, 100, seed=0).figure(_ratio)
    assert (figure.value, figure.low, figure.high) == (None, None, None)


def test_interval_is_none_when_most_resamples_miss_the_only_document_that_counts() -> None:
    bottom = np.zeros(100)
    bottom[0] = 1.0
    figure = Resampled.of({"top": 2 * bottom, "bottom": bottom}, 200, seed=0).figure(_ratio)
    assert figure.value == 2.0
    # One document of 100 is in 63 % of the resamples, where the ratio is always 2.
    assert (figure.low, figure.high) == (2.0, 2.0)
    bottom[:] = np.nan
    assert Resampled.of({"top": bottom, "bottom": bottom}, 200, seed=0).figure(_ratio).low is None
