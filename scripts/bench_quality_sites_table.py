"""The tables of scripts/bench_quality_sites: transcoders beside a peer's, SAEs of several hook points beside those of one."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.bench_quality_data import Shape
from scripts.bench_quality_measure import pooled
from scripts.bench_quality_runs import Results
from scripts.bench_quality_sites_e2e import Ending, e2e_lines
from scripts.bench_quality_table import difference, fact_lines, library_lines, mean_interval, verdict

__all__ = [
    "COMPARED",
    "TRANSCODER_LIBRARIES",
    "shares",
    "side_by_side",
    "single_name",
    "site_lines",
    "write_sites_table",
]

TRANSCODER_LIBRARIES = {
    "transcoder": ("saekit", "eai-sparsify"),
    "skip_transcoder": ("saekit", "eai-sparsify"),
}
COMPARED = {"crosscoder": ("crosscoder_topk", "crosscoder_batchtopk"), "mlsae": ("mlsae",)}
"""What is trained on all residual hook points, by part of the benchmark."""
TITLES = {
    "crosscoder_topk": "crosscoder, TopK",
    "crosscoder_batchtopk": "crosscoder, BatchTopK",
    "mlsae": "multi-layer SAE",
}


def shares(k: int, sites: int) -> list[int]:
    """Returns k in as equal whole parts as can be, the larger ones first."""
    return [k // sites + (site < k % sites) for site in range(sites)]


def single_name(site: int, k: int) -> str:
    """Returns the name in the results of what is trained on one residual hook point."""
    return f"residual {site} k {k}"


def side_by_side(singles: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns, for each seed that all have, the row of SAEs of one hook point each taken together.

    Args:
        singles: for each hook point the rows of its SAE.
    """
    seeds = set.intersection(*({row["seed"] for row in rows} for rows in singles))
    found = []
    for seed in sorted(seeds):
        rows = [next(row for row in each if row["seed"] == seed) for each in singles]
        sums = [torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("errors", "variances")]
        figures = {
            "fvu": statistics.fmean(row["fvu"] for row in rows),
            "l0": sum(row["l0"] for row in rows),
            "dead": statistics.fmean(row["dead"] for row in rows),
        }
        found.append({"seed": seed, **figures, **pooled(*sums)})
    return found


def site_lines(
    found: Mapping[str, Sequence[Mapping[str, Any]]], ours: Sequence[str], hook_points: Sequence[str]
) -> list[str]:
    """Returns the Markdown table of FVU at each hook point, and that of the differences of `ours` from all the others.

    Args:
        found: title -> rows by seed; without rows it is left out.
        ours: those titles that the others are beside.
        hook_points: names in the order of the rows' `sites`.
    """
    heads = ["", "seeds", "L0 a token", "FVU, mean", *(f"at {name}" for name in hook_points), "dead"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title, rows in found.items():
        if rows:
            l0, dead = (statistics.fmean(row[name] for row in rows) for name in ("l0", "dead"))
            figures = [mean_interval([row["fvu"] for row in each]) for each in _views(rows, len(hook_points))]
            lines.append(f"| {title} | {len(rows)} | {l0:.1f} | {' | '.join(map(str, figures))} | {dead:.4f} |")
    gaps = [
        _gap_line(title, other, found, len(hook_points))
        for title in ours
        for other in found
        if other not in ours and found[title] and found[other]
    ]
    if gaps:
        heads = ["", "FVU less that of", "mean", *(f"at {name}" for name in hook_points)]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *gaps]
    return lines


def write_sites_table(
    path: Path, results: Results, shape: Shape, ending: Ending, *, places: Mapping[str, Sequence[str]], seeds: int
) -> None:
    """Writes all that there is.

    Args:
        path: Markdown; what the file of the same name with `_notes` says is taken in.
        results: of all trainings.
        shape: sizes.
        ending: the last steps under losses through the model.
        places: hook points of `mlp`, `residual` and `e2e`.
        seeds: how many count.
    """
    sizes = f"F {shape.d_sae:,}, k {shape.k}, {shape.steps} steps of {shape.batch:,} tokens"
    lines = ["# Quality of SAEs of several hook points", "", "Written by `scripts/bench_quality_sites`.", ""]
    lines += [*fact_lines(results), *_facts(shape, ending), ""]
    notes = path.with_name(f"{path.stem}_notes.md")
    if notes.exists():
        lines += [notes.read_text(encoding="utf-8").strip(), ""]
    if results.find(data="mlp"):
        lines += [f"## Transcoders from {places['mlp'][0]} to {places['mlp'][1]}: {sizes}", ""]
        lines += [*library_lines("mlp", TRANSCODER_LIBRARIES, results, k=shape.k, seeds=seeds), ""]
    for part, title in (("crosscoder", "Crosscoders"), ("mlsae", "Multi-layer SAE")):
        found: dict[str, Sequence[Mapping[str, Any]]] = {
            TITLES[arch]: _rows(results, "residual", arch, seeds) for arch in COMPARED[part]
        }
        ours = list(found)
        if any(found.values()):
            lines += [f"## {title}: {sizes}", ""]
            lines += [*site_lines(found | _nulls(part, results, shape, places, seeds), ours, places["residual"]), ""]
    if results.find(data="e2e"):
        last = f"the last {ending.steps} of {shape.steps} steps under each loss"
        lines += [f"## Losses through the model at {places['e2e'][0]}: {last}", ""]
        lines += [*e2e_lines(results, seeds=seeds), ""]
    path.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def _nulls(
    part: str, results: Results, shape: Shape, places: Mapping[str, Sequence[str]], seeds: int
) -> dict[str, Sequence[Mapping[str, Any]]]:
    sites = len(places["residual"])
    wanted = {f"a TopK SAE each, k {shape.k}": [shape.k] * sites}
    if part == "crosscoder":
        parts = shares(shape.k, sites)
        wanted = {f"a TopK SAE each, k {' + '.join(map(str, parts))}": parts} | wanted
    return {
        title: side_by_side([_rows(results, single_name(site, k), "topk", seeds) for site, k in enumerate(ks)])
        for title, ks in wanted.items()
    }


def _rows(results: Results, data: str, arch: str, seeds: int) -> list[Mapping[str, Any]]:
    return [row for row in results.find(data=data, library="saekit", arch=arch) if row["seed"] < seeds]


def _views(rows: Sequence[Mapping[str, Any]], sites: int) -> list[list[dict[str, Any]]]:
    """The rows as they are, and as they are at each hook point."""
    return [[dict(row) for row in rows]] + [
        [{"seed": row["seed"], **row["sites"][site]} for row in rows] for site in range(sites)
    ]


def _gap_line(title: str, other: str, found: Mapping[str, Sequence[Mapping[str, Any]]], sites: int) -> str:
    gaps = [
        difference(mine, theirs, "fvu")
        for mine, theirs in zip(_views(found[title], sites), _views(found[other], sites), strict=True)
    ]
    cells = [f"{gap}, {verdict(gap, more_is_better=False)}" for gap in gaps]
    return f"| {title} | {other} | {' | '.join(cells)} |"


def _facts(shape: Shape, ending: Ending) -> list[str]:
    """Markdown lines: what a figure needs beside it to count, as far as it is not that of quality.md."""
    return [
        "- Tokens, order, calibration to the wanted L0, dead features, ± and the gate between our reading of a file and the library's own "
        f"forward are as in [quality.md](quality.md); FVU is on {shape.test_tokens:,} held-out tokens of other documents at most.",
        "- Ours have all defaults. eai-sparsify is the only peer that trains transcoders (sae-lens runs them, dictionary-learning has "
        "none); its learning rate is chosen among three from its own downwards, and further ones while the smallest or largest is "
        "the best, for FVU on the test tokens themselves, and that transcoder counts as seed 0, which favors it.",
        "- No peer trains crosscoders or multi-layer SAEs with top-k, so beside them stand TopK SAEs of one hook point each, of the same "
        "width, trained with our defaults on the same tokens for as many steps. FVU, mean = over hook points.",
        f"- Losses through the model: TopK, a learning rate of {ending.lr:g} in the last steps for all, `mse` = the reconstruction goes on; L0 "
        f"is k for all. KL to the model's own predictions in nats and CE recovered (1 = no loss, 0 = zero ablation) on {ending.loss_tokens:,} "
        "positions, in brackets 95 % over documents.",
    ]
