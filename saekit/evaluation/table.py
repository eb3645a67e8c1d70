"""From per-document sums to the rows, references and histograms of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from saekit.evaluation.bootstrap import Resampled, Statistic, Sums
from saekit.evaluation.definitions import METRICS
from saekit.evaluation.model_loss import LOSS_METRICS, REFERENCE
from saekit.evaluation.reconstruction import RECONSTRUCTION_METRICS, Candidate, ReconstructionSums
from saekit.evaluation.record import EvaluationRow, Figure, Histogram

__all__ = ["MeasuredRow", "cosine_histogram", "density_histogram", "reference_losses"]

_MASSIVE_METRICS: Mapping[str, Statistic] = {"fvu_massive": RECONSTRUCTION_METRICS["fvu"]}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeasuredRow:
    """One candidate with the resampled sums that its metrics are ratios of."""

    candidate: Candidate
    firings: npt.NDArray[np.int64]
    """Tokens on which each feature fires `[num_features]`."""
    parts: tuple[tuple[Resampled, Mapping[str, Statistic]], ...]
    """Ordinary tokens, massive tokens, model loss: those that were measured, the same for every row of a table."""

    @classmethod
    def of(
        cls,
        candidate: Candidate,
        ordinary: ReconstructionSums,
        *,
        massive: Sums | None,
        loss: Sums | None,
        num_bootstrap: int,
        seed: int,
    ) -> Self:
        """Resamples a candidate's sums; rows of one table need the same `num_bootstrap` and `seed`."""
        given = ((ordinary.sums, RECONSTRUCTION_METRICS), (massive, _MASSIVE_METRICS), (loss, LOSS_METRICS))
        parts = tuple(
            (Resampled.of(sums, num_bootstrap, seed=seed), metrics) for sums, metrics in given if sums is not None
        )
        return cls(candidate=candidate, firings=ordinary.firings, parts=parts)

    def row(self, sae: "MeasuredRow") -> EvaluationRow:
        """Returns the row of the table, with its paired differences from the SAE's row (none in that row itself)."""
        figures = {name: Figure() for name in METRICS}
        for resampled, metrics in self.parts:
            figures |= {name: resampled.figure(statistic) for name, statistic in metrics.items()}
        if self.candidate.num_features:
            figures["dead_fraction"] = Figure.of(float((self.firings == 0).mean()))
        difference: dict[str, Figure] = {}
        if self is not sae:
            for (theirs, metrics), (mine, _) in zip(sae.parts, self.parts, strict=True):
                difference |= {name: theirs.difference(mine, statistic) for name, statistic in metrics.items()}
        return EvaluationRow(
            name=self.candidate.name, title=self.candidate.title, metrics=figures, difference=difference
        )


def reference_losses(loss: Sums | None) -> dict[str, float | None]:
    """Returns the losses in nats that all rows share; None each where none were measured."""
    if loss is None:
        return dict.fromkeys(REFERENCE)
    return {name: float(loss[name].sum() / loss["positions"].sum()) for name in REFERENCE}


def density_histogram(firings: npt.NDArray[np.int64], num_tokens: int) -> Histogram:
    """Returns log10 densities of the features that fire, in quarter decades from the least that `num_tokens` can show."""
    lowest = np.floor(-4 * np.log10(num_tokens)) / 4
    edges = np.arange(min(lowest, -0.25), 0.125, 0.25)
    return _histogram(np.log10(firings[firings > 0] / num_tokens), edges)


def cosine_histogram(cosines: npt.NDArray[np.float32]) -> Histogram:
    """Returns a histogram of cosines in 40 bins from -1 to 1."""
    return _histogram(cosines.astype(np.float64), np.arange(-20, 21) / 20)


def _histogram(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> Histogram:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
