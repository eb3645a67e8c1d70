"""Intervals for ratios of sums by resampling documents: tokens of one document are not independent draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from saekit.evaluation.record import Figure

__all__ = ["Float64Array", "Resampled", "Statistic", "Sums", "resample_documents"]

Float64Array = npt.NDArray[np.float64]

Sums = Mapping[str, Float64Array]
"""Name of a quantity -> its sums: one number a resample, `[B]`, or a single one, `[]`."""

Statistic = Callable[[Sums], Float64Array]
"""A ratio of sums, e.g. squared error over variance, for all resamples at once."""

# Replicates x documents of one block of draws: 32 MB of float64.
_BLOCK_DRAWS = 4_000_000


def resample_documents(sums: Float64Array, num_bootstrap: int, *, seed: int) -> Float64Array:
    """Returns column totals over `num_bootstrap` resamples of the documents, `[num_bootstrap, num_columns]` float64.

    Args:
        sums: per-document sums, `[num_documents, num_columns]`.
        num_bootstrap: number of resamples; each draws `num_documents` documents with replacement.
        seed: of the draws; the same seed and number of documents give the same draws, which is what pairs rows.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
    """
    rng = np.random.default_rng(seed)
    num_documents = len(sums)
    totals = np.empty((num_bootstrap, sums.shape[1]))
    block = max(1, _BLOCK_DRAWS // max(1, num_documents))
    for start in range(0, num_bootstrap, block):
        size = min(block, num_bootstrap - start)
        drawn = rng.integers(0, num_documents, size=(size, num_documents))
        drawn += np.arange(size)[:, None] * num_documents
        weights = np.bincount(drawn.ravel(), minlength=size * num_documents).reshape(size, num_documents)
        totals[start : start + size] = weights.astype(np.float64) @ sums
    return totals


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """The totals of named per-document sums, and the same totals over resamples of the documents."""

    totals: Sums
    draws: Sums

    @classmethod
    def of(cls, sums: Sums, num_bootstrap: int, *, seed: int) -> Self:
        """Returns totals and draws of per-document sums, each `[num_documents]`.

        Fewer than two documents say nothing about the spread between documents: there are no draws then.
        """
        names = list(sums)
        columns = np.stack([sums[name] for name in names], axis=1)
        size = num_bootstrap if len(columns) > 1 else 0
        draws = resample_documents(columns, size, seed=seed)
        return cls(
            dict(zip(names, columns.sum(axis=0), strict=True)),
            dict(zip(names, draws.T, strict=True)),
        )

    def figure(self, statistic: Statistic) -> Figure:
        """Returns the statistic with its 95 % percentile interval; None where it is undefined."""
        return self._figure(_evaluate(statistic, self.totals), _evaluate(statistic, self.draws))

    def difference(self, other: "Resampled", statistic: Statistic) -> Figure:
        """Returns this statistic minus the other's on the same draws of documents."""
        values = _evaluate(statistic, self.totals) - _evaluate(statistic, other.totals)
        return self._figure(values, _evaluate(statistic, self.draws) - _evaluate(statistic, other.draws))

    @staticmethod
    def _figure(value: Float64Array, draws: Float64Array) -> Figure:
        defined = draws[np.isfinite(draws)]
        # A resample may miss every document on which the statistic is defined; if most do, the interval means nothing.
        if len(defined) == 0 or 2 * len(defined) < len(draws):
            return Figure.of(float(value))
        low, high = np.quantile(defined, (0.025, 0.975))
        return Figure.of(float(value), float(low), float(high))


def _evaluate(statistic: Statistic, sums: Sums) -> Float64Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(statistic(sums), dtype=np.float64)
