"""Statistics against plain numpy over the whole array, and the rule for massive activations against planted norms."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from saekit.activations.rows import MASSIVE, NORMAL, PADDING, SPECIAL
from saekit.activations.statistics import (
    QUANTILES,
    Statistics,
    compute_statistics,
    read_statistics,
    tell_massive,
    write_statistics,
)
from saekit.errors import DataError, StoreError


def planted() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Returns x [600, 16, 5], kinds before the rule, and norms; position 0 special in half of the rows."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(600, 16, 5)) + np.array([3.0, 0.0, 0.0, -1.0, 0.0])).astype(np.float32)
    kinds = np.full((600, 16), NORMAL, np.uint8)
    kinds[::2, 0] = SPECIAL
    kinds[590:, 12:] = PADDING
    x[::2, 0] *= 300
    x[::50, 7] *= 200
    x[590:, 12:] *= 900
    return x, kinds, np.linalg.norm(x, axis=-1).astype(np.float32)


def statistics_of(x: npt.NDArray[np.float32], kinds: npt.NDArray[np.uint8], threshold: float) -> Statistics:
    norms = np.linalg.norm(x, axis=-1).astype(np.float32)
    return compute_statistics(lambda rows: x[rows], kinds, norms, massive_threshold=threshold)


def test_massive_tokens_are_those_above_the_median_times_the_factor() -> None:
    norms = np.array([[1.0, 2.0, 3.0, 20.0, 20.1, 500.0, 900.0, 7.0]], np.float32)
    kinds = np.array([[0, 0, 0, 0, 0, SPECIAL, PADDING, SPECIAL]], np.uint8)
    told, threshold = tell_massive(kinds, norms, factor=6.7)
    assert threshold == pytest.approx(3.0 * 6.7)
    assert told.tolist() == [[0, 0, 0, 0, 0, SPECIAL, PADDING, SPECIAL]]
    told, threshold = tell_massive(kinds, norms, factor=6.69)
    assert told.tolist() == [[0, 0, 0, 0, MASSIVE, SPECIAL, PADDING, SPECIAL]]
    assert kinds[0, 4] == NORMAL, "the input is not changed"


def test_rows_without_a_normal_token_are_refused() -> None:
    with pytest.raises(DataError, match="every token is special or padding"):
        tell_massive(np.full((2, 2), SPECIAL, np.uint8), np.ones((2, 2), np.float32), factor=10)


def test_statistics_equal_those_of_the_whole_array() -> None:
    x, kinds, norms = planted()
    kinds, threshold = tell_massive(kinds, norms, factor=10)
    statistics = statistics_of(x, kinds, threshold)
    normal = x[kinds == NORMAL].astype(np.float64)
    mean = normal.mean(axis=0)
    offset = np.linalg.norm(normal - mean, axis=1)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-12)
    assert statistics.mean_norm == pytest.approx(np.linalg.norm(normal, axis=1).mean(), rel=1e-6)
    assert statistics.mean_norm_centred == pytest.approx(offset.mean(), rel=1e-12)
    assert statistics.total_variance == pytest.approx(normal.var(axis=0).sum(), rel=1e-12)
    assert statistics.median_norm == pytest.approx(np.median(np.linalg.norm(normal, axis=1)), rel=1e-6)
    np.testing.assert_allclose(
        statistics.norm_quantiles, np.quantile(np.linalg.norm(normal, axis=1), QUANTILES), rtol=1e-6
    )
    assert statistics.num_massive == int((kinds == MASSIVE).sum()) == 12
    assert (statistics.num_special, statistics.num_padding) == (300, 40)
    assert statistics.num_tokens == 600 * 16


def test_variance_shares_are_about_the_mean_of_all_but_padding() -> None:
    x, kinds, norms = planted()
    kinds, threshold = tell_massive(kinds, norms, factor=10)
    statistics = statistics_of(x, kinds, threshold)
    kept = x[kinds != PADDING].astype(np.float64)
    squares = ((kept - kept.mean(axis=0)) ** 2).sum(axis=1)
    of_kind = kinds[kinds != PADDING]
    assert statistics.massive_variance_share == pytest.approx(squares[of_kind == MASSIVE].sum() / squares.sum())
    assert statistics.special_variance_share == pytest.approx(squares[of_kind == SPECIAL].sum() / squares.sum())
    assert statistics.special_variance_share > 0.9


def test_position_norms_are_of_normal_tokens() -> None:
    x, kinds, norms = planted()
    kinds[:, 3] = SPECIAL
    statistics = statistics_of(x, kinds, 1e9)
    expected = [norms[kinds[:, t] == NORMAL, t].mean(dtype=np.float64) if t != 3 else np.nan for t in range(16)]
    np.testing.assert_allclose(statistics.position_norms, expected, rtol=1e-6)
    expected = [norms[kinds[:, t] != PADDING, t].mean(dtype=np.float64) for t in range(16)]
    np.testing.assert_allclose(statistics.position_norms_all, expected, rtol=1e-6)


def test_file_holds_statistics_exactly(tmp_path: Path) -> None:
    x, kinds, _ = planted()
    kinds[:, 3] = SPECIAL
    statistics = statistics_of(x, kinds, 1e9)
    write_statistics(tmp_path / "statistics.json", statistics)
    read = read_statistics(tmp_path / "statistics.json")
    for name in Statistics.__slots__:
        before, after = getattr(statistics, name), getattr(read, name)
        assert type(before) is type(after)
        assert np.array_equal(before, after, equal_nan=isinstance(before, np.ndarray))


@pytest.mark.parametrize("content", [None, "{", '{"mean": [1.0]}', '{"mean": "x"}'])
def test_broken_file_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "statistics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StoreError, match="verify the cache"):
        read_statistics(path)
