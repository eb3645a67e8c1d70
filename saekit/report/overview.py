"""What the overview pages show: the token store, and per run curves, metric table, histograms and provenance."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from saekit.activations import ActivationStore
from saekit.evaluation import Evaluation, Figure, Histogram
from saekit.evaluation.definitions import metric_info
from saekit.labelling.scoring.summary import FIGURES, is_scored
from saekit.manifest import Manifest
from saekit.report.judged import describe_judged, describe_outcome
from saekit.report.payload import JSONValue, finite
from saekit.report.sources import RunSource

__all__ = ["describe_manifest", "describe_run", "describe_store"]

CURVES = ("loss", "fvu", "l0", "dead_fraction")
MAX_CURVE_POINTS = 400
NUM_NORM_BINS = 64
KINDS = {"normal": 0, "special": 2, "massive": 3}


def describe_store(store: ActivationStore) -> dict[str, JSONValue]:
    """Returns the norm profile of one hook point: what was kept, what was left out, and why it matters."""
    statistics = store.statistics
    counts: dict[str, JSONValue] = {
        "normal": statistics.num_normal,
        "padding": statistics.num_padding,
        "special": statistics.num_special,
        "massive": statistics.num_massive,
    }
    return {
        "hook_point": store.hook_point,
        "model": store.model_name,
        "d_in": store.d_in,
        "rows": store.num_rows,
        "context_len": store.context_len,
        "documents": store.num_documents,
        "tokens": counts,
        "massive_threshold": finite(statistics.massive_threshold),
        "massive_variance_share": finite(statistics.massive_variance_share),
        "mean_norm": finite(statistics.mean_norm),
        "median_norm": finite(statistics.median_norm),
        "special_variance_share": finite(statistics.special_variance_share),
        "position_norms": [finite(norm) for norm in statistics.position_norms.tolist()],
        "position_norms_all": [finite(norm) for norm in statistics.position_norms_all.tolist()],
        "norm_histogram": _norm_histogram(store.norms(), store.kinds()),
    }


def _norm_histogram(norms: NDArray[np.float32], kinds: NDArray[np.uint8]) -> JSONValue:
    """Returns counts of tokens over log-spaced norms, one series a kind; padding has no say."""
    usable = (kinds != 1) & np.isfinite(norms) & (norms > 0)
    if not usable.any():
        return None
    low, high = float(norms[usable].min()), float(norms[usable].max())
    edges = np.geomspace(low, max(high, low * 1.001), NUM_NORM_BINS + 1)
    # Rounding must not push the extremes out of the outer bins.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    series: dict[str, JSONValue] = {}
    for name, code in KINDS.items():
        counts, _ = np.histogram(norms[usable & (kinds == code)], edges)
        series[name] = cast(JSONValue, counts.tolist())
    return {"edges": cast(JSONValue, [float(edge) for edge in edges]), "series": series}


def describe_run(run: RunSource) -> dict[str, JSONValue]:
    """Returns everything that the overview of a run shows."""
    return {
        "name": run.name,
        "hook_point": run.hook_point,
        "architecture": cast(JSONValue, dict(run.architecture)),
        "curves": cast(JSONValue, _curves(run.curves)),
        "evaluation": None if run.evaluation is None else _evaluation(run.evaluation),
        "density": None if run.density is None else _density(run.density),
        "features": _feature_counts(run),
        "histogram_edges": None
        if run.contexts is None
        else cast(JSONValue, [float(edge) for edge in run.contexts.histogram_edges]),
        "scanned_tokens": None if run.contexts is None else run.contexts.num_tokens,
        "window": None if run.contexts is None else run.contexts.window,
        "labelers": [_labeler(run, labeler) for labeler in run.labelers],
        "controls": _controls(run),
        "judged": describe_judged(run),
        "outcome": describe_outcome(run),
        "stages": {stage: describe_manifest(manifest) for stage, manifest in run.manifests.items()},
    }


def _curves(rows: Sequence[Mapping[str, object]]) -> dict[str, dict[str, list[float | None]]]:
    """Returns split -> column -> values over tokens; long curves keep evenly spaced points and the last one."""
    curves: dict[str, dict[str, list[float | None]]] = {}
    for split in ("train", "test"):
        here = [row for row in rows if row.get("split", "train") == split and finite(row.get("tokens")) is not None]
        if not here:
            continue
        kept = np.unique(np.linspace(0, len(here) - 1, min(len(here), MAX_CURVE_POINTS)).round().astype(int))
        columns = {"tokens", *CURVES} & {key for row in here for key in row}
        curves[split] = {name: [finite(here[n].get(name)) for n in kept] for name in sorted(columns)}
    return curves


def _density(density: NDArray[np.float64]) -> JSONValue:
    """Returns the histogram of log10 density over the features that fire, and how many never do."""
    alive = density > 0
    logs = np.log10(density[alive])
    if not len(logs):
        return {"edges": [], "counts": [], "never": int((~alive).sum())}
    low, high = np.floor(logs.min() * 4) / 4, np.ceil(logs.max() * 4) / 4
    counts, edges = np.histogram(logs, np.arange(low, high + 0.125, 0.125) if high > low else [low - 0.1, low + 0.1])
    return {
        "edges": cast(JSONValue, edges.tolist()),
        "counts": cast(JSONValue, counts.tolist()),
        "never": int((~alive).sum()),
    }


def _feature_counts(run: RunSource) -> dict[str, JSONValue]:
    labelled = {feature for (feature, _), label in run.labels.items() if label.status == "done" and label.label}
    return {
        "total": run.d_sae,
        "firing": None if run.density is None else int((run.density > 0).sum()),
        "labelled": len(labelled) if run.labels else None,
    }


def _labeler(run: RunSource, labeler: str) -> dict[str, JSONValue]:
    """Returns how a labeler did over all features, one entry a scorer; medians over scored labels."""
    mine = [label for (_, name), label in run.labels.items() if name == labeler]
    scorers: dict[str, JSONValue] = {}
    for scorer in sorted({scorer for _, name, scorer in run.scores if name == labeler}):
        scores = [score for (_, name, by), score in run.scores.items() if name == labeler and by == scorer]
        entry: dict[str, JSONValue] = {"scored": sum(is_scored(score) for score in scores)}
        for name in ("f1", "auprc", "base_rate", *FIGURES):
            values = [value for score in scores if (value := getattr(score, name)) is not None]
            if values or name in {"f1", "auprc", "base_rate"}:
                entry[name] = finite(np.median(values)) if values else None
        scorers[scorer] = entry
    return {
        "name": labeler,
        "done": sum(label.status == "done" for label in mine),
        "failed": sum(label.status == "failed" for label in mine),
        "scorers": scorers,
    }


def _controls(run: RunSource) -> JSONValue:
    """Returns the mean rule scores of the labels beside those of labels that know nothing; None where nothing was scored."""
    manifest = run.manifests.get("label")
    found = manifest.counts.get("rule_scores") if manifest is not None else None
    if not isinstance(found, dict) or not found.get("labels"):
        return None
    return {str(name): finite(value) for name, value in found.items()}


def _evaluation(evaluation: Evaluation) -> dict[str, JSONValue]:
    shown = evaluation.metric_names()
    return {
        "metrics": [
            {
                "name": name,
                "title": info.title,
                "digits": info.digits,
                "definition": evaluation.definitions.get(name, info.definition),
            }
            for name, info in ((name, metric_info(name)) for name in shown)
        ],
        "rows": [
            {
                "name": row.name,
                "title": row.title,
                "definition": evaluation.definitions.get(row.name),
                "metrics": {name: _figure(row.metrics.get(name)) for name in shown},
            }
            for row in evaluation.rows
        ],
        "reference": cast(JSONValue, {name: finite(value) for name, value in evaluation.reference.items()}),
        "num_tokens": evaluation.num_tokens,
        "num_documents": evaluation.num_documents,
        "num_loss_tokens": evaluation.num_loss_tokens,
        "num_massive": evaluation.num_massive,
        "num_bootstrap": evaluation.num_bootstrap,
        "density": _histogram(evaluation.density),
        "decoder_cosine": _histogram(evaluation.decoder_cosine),
    }


def _figure(figure: Figure | None) -> JSONValue:
    if figure is None or figure.value is None:
        return None
    return [figure.value, figure.low, figure.high]


def _histogram(histogram: Histogram) -> dict[str, JSONValue]:
    return {"edges": list(histogram.edges), "counts": list(histogram.counts)}


def describe_manifest(manifest: Manifest) -> dict[str, JSONValue]:
    """Returns what a stage's manifest says of where its folder comes from."""
    return {
        "config": cast(JSONValue, manifest.config),
        "config_sha256": manifest.config_sha256,
        "counts": cast(JSONValue, manifest.counts),
        "versions": cast(JSONValue, manifest.versions),
        "started": manifest.started,
        "finished": manifest.finished,
    }
