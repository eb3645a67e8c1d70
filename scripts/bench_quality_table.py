"""The table of scripts/bench_quality: means over seeds, intervals, and our difference from the best peer."""

import datetime
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saekit.evaluation.bootstrap import resample_documents
from scripts.bench_peers import PEERS, TORCH, commit_now, cpu_name
from scripts.bench_quality_data import PLANTED, Shape
from scripts.bench_quality_runs import ARCHITECTURES, LIBRARIES, Results, merit

__all__ = [
    "Interval",
    "chosen_rows",
    "difference",
    "fact_lines",
    "library_lines",
    "mean_interval",
    "verdict",
    "write_table",
]

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NUM_BOOTSTRAP = 2000
FIGURES = {"fvu": ("FVU", False), "mcc": ("MCC", True), "f1": ("F1", True)}
"""Title, and whether more is better."""
TITLES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "relu": "ReLU + L1",
    "matryoshka_batchtopk": "Matryoshka BatchTopK",
    "matryoshka_topk": "Matryoshka TopK",
    "transcoder": "Transcoder",
    "skip_transcoder": "Skip transcoder",
}


class Interval(NamedTuple):
    """A mean and half of its 95 % interval; NaN where there is one seed."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns the mean over seeds with Student's interval."""
    if len(values) < 2:
        return Interval(statistics.fmean(values), math.nan)
    quantile = T_QUANTILES.get(len(values) - 1, 1.96)
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], figure: str) -> Interval:
    """Returns ours minus theirs over the seeds that both have, paired; FVU with the spread over documents as well.

    The two spreads are independent, so their halves add in squares; from one seed there is that over documents alone.
    """
    seeds = sorted({row["seed"] for row in ours} & {row["seed"] for row in theirs})
    pairs = [[next(row for row in rows if row["seed"] == seed) for rows in (ours, theirs)] for seed in seeds]
    over_seeds = mean_interval([mine[figure] - other[figure] for mine, other in pairs])
    if figure != "fvu":
        return over_seeds
    errors = [np.mean([pair[side]["errors"] for pair in pairs], axis=0) for side in (0, 1)]
    sums = np.stack([errors[0] - errors[1], np.asarray(pairs[0][0]["variances"])], axis=1)
    totals = resample_documents(sums, NUM_BOOTSTRAP, seed=0)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], (0.025, 0.975))
    return Interval(over_seeds.mean, math.hypot(0.0 if len(pairs) < 2 else over_seeds.half, (high - low) / 2))


def verdict(found: Interval, *, more_is_better: bool) -> str:
    """Returns better, worse or, where the interval holds 0, the same; nothing from one seed."""
    if math.isnan(found.half):
        return "one seed"
    if abs(found.mean) <= found.half:
        return "no difference"
    return "better" if (found.mean > 0) == more_is_better else "worse"


def chosen_rows(rows: Sequence[Mapping[str, Any]], *, k: int, seeds: int) -> list[Mapping[str, Any]]:
    """Returns those of the setting that most seeds were trained with, the best one of several: the search trains one only."""
    by_setting: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["seed"] < seeds:
            by_setting.setdefault((row["lr"], row["coefficient"]), []).append(row)
    return max(by_setting.values(), key=lambda group: (len(group), merit(group[0], k)), default=[])


def write_table(path: Path, results: Results, shapes: Mapping[str, Shape], *, seeds: int) -> None:
    """Writes the figures of the settings that were chosen.

    Args:
        path: Markdown; what `quality_notes.md` beside it says is taken in.
        results: of all trainings, those of the search too.
        shapes: by part.
        seeds: how many count.
    """
    lines = ["# Quality of trained SAEs", "", "Written by `scripts/bench_quality`.", "", *_facts(results), ""]
    notes = path.with_name("quality_notes.md")
    if notes.exists():
        lines += [notes.read_text(encoding="utf-8").strip(), ""]
    for data, shape in shapes.items():
        lines += _part(data, shape, results, seeds)
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _part(data: str, shape: Shape, results: Results, seeds: int) -> list[str]:
    sizes = f"F {shape.d_sae:,}, k {shape.k}, {shape.steps} steps of {shape.batch:,} tokens"
    title = "Planted dictionary" if data == "planted" else "Real activations"
    return [f"## {title}: {sizes}", "", *library_lines(data, ARCHITECTURES, results, k=shape.k, seeds=seeds), ""]


def library_lines(
    data: str, architectures: Mapping[str, Sequence[str]], results: Results, *, k: int, seeds: int
) -> list[str]:
    """Returns the Markdown table of what libraries reach on one data set, and that of our differences from the best peers.

    Args:
        data: name in the results.
        architectures: with the libraries that have each.
        results: of all trainings.
        k: wanted L0.
        seeds: how many count.
    """
    names = [name for name in FIGURES if data == "planted" or name == "fvu"]
    heads = ["architecture", "library", "seeds", "lr", "penalty", "L0", *(FIGURES[name][0] for name in names), "dead"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    verdicts = []
    for arch, libraries in architectures.items():
        found: dict[str, list[Mapping[str, Any]]] = {}
        for library in libraries:
            rows = chosen_rows(results.find(data=data, library=library, arch=arch), k=k, seeds=seeds)
            if rows:
                found[library] = rows
                lines.append(f"| {' | '.join([TITLES[arch], library, *_cells(rows, names)])} |")
        verdicts += _verdicts(arch, found, names)
    if verdicts:
        lines += ["", "| architecture | figure | best peer | ours less its | |", "|---|---|---|---|---|", *verdicts]
    return lines


def _cells(rows: list[Mapping[str, Any]], names: list[str]) -> list[str]:
    first = rows[0]
    chosen = ["own" if first[name] is None else f"{first[name]:.3g}" for name in ("lr", "coefficient")]
    raw = statistics.fmean(row["raw_l0"] for row in rows)
    figures = [str(mean_interval([row[name] for row in rows])) for name in names]
    return [str(len(rows)), *chosen, f"{raw:.1f}", *figures, f"{statistics.fmean(row['dead'] for row in rows):.4f}"]


def _verdicts(arch: str, found: dict[str, list[Mapping[str, Any]]], names: list[str]) -> list[str]:
    ours = found.pop(LIBRARIES[0], [])
    lines = []
    for name in names:
        title, more_is_better = FIGURES[name]
        peers = {
            library: rows
            for library, rows in found.items()
            if {row["seed"] for row in ours} & {row["seed"] for row in rows}
        }
        if not peers:
            continue
        sign = -1.0 if more_is_better else 1.0
        best = min(peers, key=lambda library: sign * statistics.fmean(row[name] for row in peers[library]))
        gap = difference(ours, peers[best], name)
        result = verdict(gap, more_is_better=more_is_better)
        if not math.isnan(gap.half) and len({row["seed"] for row in ours} & {row["seed"] for row in peers[best]}) < 2:
            result += ", on one seed"
        lines.append(f"| {TITLES[arch]} | {title} | {best} | {gap} | {result} |")
    return lines


def _facts(results: Results) -> list[str]:
    """Markdown lines: everything that a figure needs beside it to count."""
    planted = f"{PLANTED.num_features} features in {PLANTED.d_in} dimensions"
    return [
        *fact_lines(results),
        "- Every library trains with its own trainer on the same tokens in the same order; ours with all defaults. Of a peer, TopK "
        "is tried with three learning rates from its own upwards (eai-sparsify: downwards), and larger ones while the largest is the "
        "best; the other architectures with the best of them and on the planted dictionary 0.3 times that, on real activations for "
        "penalties 3 or else 0.3 times that. Penalties are searched until L0 is within 20 %. Peers are tuned for F1 on another "
        "planted dictionary; on real activations for FVU on the test tokens themselves, and that SAE counts as seed 0, which favors "
        "them.",
        "- sae-lens: its penalties are warmed up over 5 % and its rate falls over the last fifth, as in its tutorials, and its JumpReLU "
        "is the tanh recipe. dictionary-learning: activations normalised, the rate rises over 5 % and falls over the last fifth, as "
        "in its demo. eai-sparsify: its schedule-free signum. A feature is dead after a thirtieth of the training, for all.",
        "- L0 is that of the inference rule as trained. FVU, MCC and F1 are at exactly the wanted L0: what "
        "pre-activations are compared with is moved by one number, for every library alike, on training tokens (thresholds by a "
        "factor, biases of ReLU and of gates by a shift; top-k needs none).",
        "- FVU is pooled around the mean of the held-out tokens, of other documents than those of training; dead = as trained, active on "
        "none of them. MCC: mean absolute cosine of the best one-to-one matching of decoder rows and planted features. F1: of the "
        "firing of matched pairs, averaged over the F most frequent planted features, 0 where one has no partner.",
        f"- Planted: {planted}, trees of mutually exclusive children that need their parent, correlated roots "
        "(`saekit.evaluation.planted`).",
        "- ± is half of the 95 % interval over seeds (Student's t); of a difference it is paired by seed, and for FVU has the "
        "spread over documents (bootstrap) added in squares; from one seed it is that over documents alone.",
        "- Before an SAE counts, our reading of its files gives the FVU and L0 of the library's own encode and decode within 0.2 %.",
    ]


def fact_lines(results: Results) -> list[str]:
    """Returns a Markdown line of day, machine and versions."""
    versions = {row["library"]: row["version"] for row in results.rows}
    peers = ", ".join(f"{name} {versions[name]}" for name in PEERS if name in versions)
    own = f"saekit at {commit_now()}, torch {importlib.metadata.version('torch')}, Python {platform.python_version()}"
    return [
        f"- {datetime.date.today().isoformat()}; {cpu_name()}; {own}; {peers}, all with {TORCH.replace('==', ' ')}, float32."
    ]
