"""From per-document sums to the rows, references and histograms of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from saekit.evaluation.bootstrap import Float64Array, Resampled, Statistic, Sums
from saekit.evaluation.definitions import METRICS, SITE_METRICS, metric_at
from saekit.evaluation.model_loss import LOSS_METRICS, REFERENCE
from saekit.evaluation.reconstruction import RECONSTRUCTION_METRICS, Candidate, ReconstructionSums
from saekit.evaluation.record import EvaluationRow, Figure, Histogram

__all__ = ["MeasuredRow", "SiteSums", "cosine_histogram", "density_histogram", "reference_losses"]

_MASSIVE_METRICS: Mapping[str, Statistic] = {"fvu_massive": RECONSTRUCTION_METRICS["fvu"]}


class SiteSums(NamedTuple):
    """What was summed for one candidate at one hook point."""

    hook_point: str
    ordinary: ReconstructionSums
    """Over ordinary tokens."""
    massive: Sums | None = None
    """Over massive ones; None where there are none."""
    loss: Sums | None = None
    """Of the language model's losses; None where they were not measured."""


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
        sites: Sequence[SiteSums],
        *,
        firings: npt.NDArray[np.int64],
        num_bootstrap: int,
        seed: int,
    ) -> Self:
        """Resamples a candidate's sums; rows of one table need the same hook points, `num_bootstrap` and `seed`."""
        given = (
            ({site.hook_point: site.ordinary.sums for site in sites}, RECONSTRUCTION_METRICS),
            ({site.hook_point: site.massive for site in sites if site.massive is not None}, _MASSIVE_METRICS),
            ({site.hook_point: site.loss for site in sites if site.loss is not None}, LOSS_METRICS),
        )
        merged = [_over_sites(sums, metrics) for sums, metrics in given if sums]
        parts = tuple((Resampled.of(sums, num_bootstrap, seed=seed), metrics) for sums, metrics in merged)
        return cls(candidate=candidate, firings=firings, parts=parts)

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


def _over_sites(sums: Mapping[str, Sums], metrics: Mapping[str, Statistic]) -> tuple[Sums, Mapping[str, Statistic]]:
    """Returns the sums of all hook points under names of their own, with the metrics' means over hook points and some of each."""
    if len(sums) == 1:
        return next(iter(sums.values())), metrics
    joined = {metric_at(name, site): values for site, own in sums.items() for name, values in own.items()}

    def at(site: str, statistic: Statistic) -> Statistic:
        return lambda s: statistic({name: s[metric_at(name, site)] for name in sums[site]})

    def mean(statistic: Statistic) -> Statistic:
        def over(s: Sums) -> Float64Array:
            return np.asarray(np.mean([at(site, statistic)(s) for site in sums], axis=0))

        return over

    of_all = {name: mean(statistic) for name, statistic in metrics.items()}
    of_each = {
        metric_at(name, site): at(site, metrics[name]) for name in SITE_METRICS if name in metrics for site in sums
    }
    return joined, of_all | of_each


def reference_losses(sites: Sequence[SiteSums]) -> dict[str, float | None]:
    """Returns the losses in nats that all rows share, the mean over hook points; None each where none were measured."""
    losses = [site.loss for site in sites if site.loss is not None]
    if not losses:
        return dict.fromkeys(REFERENCE)
    return {name: float(np.mean([loss[name].sum() / loss["positions"].sum() for loss in losses])) for name in REFERENCE}


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
