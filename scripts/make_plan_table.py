"""Writes the tables of docs/plan.md: predicted beside measured, from the pages of benchmarks/, and predictions for H200s.

    .venv/bin/python -m scripts.make_plan_table

Run it after a new benchmark or a change of the model; a test holds the page to what this would write.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from saekit.sae import TopKConfig
from saekit.training import TrainConfig
from saekit.training.costs import StepCost, StoreSize, step_cost
from saekit.training.hardware import find_hardware
from saekit.training.shape import SAEShape, shape_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
MEASURED = ROOT / "benchmarks" / "training_cpu.md"
SCALING = ROOT / "benchmarks" / "scaling_cpu.md"
ROWS = ("encoder matmul alone", "saekit, compiled", "saekit, torch operators")
SHAPE = re.compile(r"### N ([\d,]+), D ([\d,]+), F ([\d,]+), k ([\d,]+)")
# Shapes of the field's models, at batches that eight and 64 devices can share: (name, d_in, d_sae, k).
LARGE = (("GPT-2 small", 768, 24_576, 32), ("Gemma 2 2B", 2304, 65_536, 64), ("Llama 3 8B", 4096, 131_072, 64))
BATCH = 65_536
COUNTS = (1, 8, 64, 512)


class Comparison(NamedTuple):
    """One measured row and what the model says of it."""

    shape: str
    what: str
    predicted_ms: float
    measured_ms: float

    @property
    def ratio(self) -> float:
        """Measured in multiples of predicted."""
        return self.measured_ms / self.predicted_ms


class ScalingRow(NamedTuple):
    """A layout on one machine."""

    shape: str
    layout: str
    processes: int
    sent_mb: float
    model_mb: float
    predicted_ms: float
    measured_ms: float


FIGURES = ("sent, MB", "model, MB", "predicted, ms", "step, ms")
"""Columns of the benchmark's page, in the order of the row's last fields."""


def comparisons() -> Iterator[Comparison]:
    """Yields the rows of the benchmark that the model speaks of, in wall time."""
    hardware = find_hardware("cpu")
    for section in re.split(r"(?=^### )", MEASURED.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if found := SHAPE.match(section):
            tokens, d_in, d_sae, k = (int(number.replace(",", "")) for number in found.groups())
            shape = shape_of(TopKConfig(d_in=d_in, d_sae=d_sae, k=k))
            step = _step(shape, tokens, num_processes=1, gpu="cpu")
            product = 2 * tokens * d_in * d_sae / hardware.flops("float32")
            for what in ROWS:
                seconds = product if what == ROWS[0] else step.seconds
                yield Comparison(found.group()[4:], what, seconds * 1e3, _measured(section, what))


def _measured(section: str, what: str) -> float:
    row = next(line for line in section.splitlines() if line.startswith(f"| {what} |"))
    return float(row.split("|")[3].split("(")[0].replace(",", ""))


def _step(shape: SAEShape, tokens: int, *, num_processes: int, gpu: str, stored: bool = False) -> StepCost:
    # Without a store to read: the benchmark's tokens lie in memory.
    store = StoreSize(num_tokens=10**9 if stored else 1, token_bytes=2 * shape.batch_width if stored else 1)
    config = TrainConfig(num_tokens=100 * tokens, batch_size=tokens)
    return step_cost(shape, config, find_hardware(gpu), store=store, num_processes=num_processes)


def _comparison_table() -> str:
    lines = ["| shape | step | predicted, ms | measured, ms | measured / predicted |", "|---|---|---:|---:|---:|"]
    for row in comparisons():
        lines.append(
            f"| {row.shape} | {row.what} | {row.predicted_ms:,.0f} | {row.measured_ms:,.0f} | {row.ratio:.2f} |"
        )
    return "\n".join(lines)


def scaling_rows() -> Iterator[ScalingRow]:
    """Yields the layouts of the benchmark over several processes, with what it predicted from rates of the same minutes."""
    for section in re.split(r"(?=^### )", SCALING.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if found := SHAPE.match(section):
            header, *rows = (line for line in section.splitlines() if line.startswith("| "))
            names = [cell.strip() for cell in header.strip("|").split("|")]
            for row in rows:
                cells = dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=False))
                if "predicted, ms" not in cells:
                    break
                yield ScalingRow(
                    found.group()[4:],
                    cells["layout"],
                    int(cells["processes"]),
                    *(float(cells[name].split("(")[0].replace(",", "") or 0) for name in FIGURES),
                )


def _scaling_table() -> str:
    lines = [
        "| shape | layout | processes | sent, MB | model, MB | predicted, ms | measured, ms | measured / predicted |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.shape} | {row.layout} | {row.processes} | {row.sent_mb:,.1f} | {row.model_mb:,.1f} | {row.predicted_ms:,.0f} |"
        f" {row.measured_ms:,.0f} | {row.measured_ms / row.predicted_ms:.2f} |"
        for row in scaling_rows()
    ]
    return "\n".join(lines)


def _prediction_table() -> str:
    lines = [
        "| predicted, not measured | H200s | store in memory, tokens/s | bound by | store on disk, tokens/s | bound by |",
        "|---|---:|---:|---|---:|---|",
    ]
    for name, d_in, d_sae, k in LARGE:
        shape = shape_of(TopKConfig(d_in=d_in, d_sae=d_sae, k=k))
        for count in COUNTS:
            given = _step(shape, BATCH, num_processes=count, gpu="h200")
            stored = _step(shape, BATCH, num_processes=count, gpu="h200", stored=True)
            lines.append(
                f"| {name}, F {d_sae:,}, k {k} | {count} | {given.tokens_per_second:,.0f} | {given.limit} |"
                f" {stored.tokens_per_second:,.0f} | {stored.limit} |"
            )
    return "\n".join(lines)


def page_text() -> str:
    """Returns the page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (
        ("measured", _comparison_table()),
        ("scaling", _scaling_table()),
        ("h200", _prediction_table()),
    ):
        begin, end = f"<!-- {name}: scripts/make_plan_table.py -->\n", f"\n<!-- end {name} -->"
        before, rest = text.split(begin)
        text = before + begin + table + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page_text(), encoding="utf-8")
    print(f"{PAGE}: written")
