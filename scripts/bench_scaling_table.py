"""What scripts/bench_scaling writes: measured steps and bytes of the layouts beside the model's, and predictions for H200s."""

import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from saekit.sae import TopKConfig
from saekit.training import TrainConfig
from saekit.training.costs import StepCost, StoreSize, step_cost
from saekit.training.hardware import Hardware, find_hardware
from saekit.training.planner import plan_training
from saekit.training.shape import shape_of
from saekit.training.wire import step_bytes
from scripts.bench_peers import cpu_name
from scripts.bench_scaling_cases import ALONE, CASES, Case
from scripts.make_plan_table import BATCH, LARGE

__all__ = ["H200S", "Machine", "Steps", "page"]

H200S = (8, 64, 512)
GPUS_PER_NODE = 8
SMALL = ("figures", "selection")
"""Purposes whose bytes the model leaves out."""
IN_MEMORY = StoreSize(num_tokens=1, token_bytes=1)
"""No store to read: the benchmark's tokens lie in memory, and so do those of a store of at most 4 GB."""


class Steps:
    """Steps of one case: each of the slowest process, and what all of them used and sent."""

    def __init__(self) -> None:
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self.loopback_bytes: list[float] = []
        self.sent: dict[str, int] = {}

    def add(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Notes a step of which every process answered."""
        self.wall_ms.append(1e3 * max(answer["seconds"] for answer in answers))
        self.cpu_ms.append(1e3 * sum(answer["cpu_seconds"] for answer in answers))
        self.loopback_bytes.append(answers[0]["loopback_bytes"])
        self.sent = max((answer["sent"] for answer in answers), key=lambda sent: sum(sent.values()))


class Machine:
    """What the slowest of some processes gets of the machine while all of them ask for the same."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}

    def add(self, answers: Sequence[Mapping[str, float]]) -> None:
        """Notes one measurement of which every process answered."""
        for key in answers[0]:
            slowest = max if key.endswith("seconds") else min
            self.rates.setdefault(key, []).append(slowest(answer[key] for answer in answers))

    def median(self, key: str) -> float:
        """Returns the middle one of a rate."""
        return statistics.median(self.rates[key])

    def hardware(self, num_processes: int) -> Hardware:
        """Returns the device that one of these processes has, in a node of all of them."""
        changes: dict[str, float | int | None] = {
            "fp32_tflops": self.median("flops") / 1e12,
            "memory_tb_s": self.median("memory") / 1e12,
            "launch_us": self.median("operator_seconds") * 1e6,
            "gpus_per_node": num_processes,
        }
        if num_processes > 1:
            changes["link_gb_s"] = self.median("link") / 1e9
        return find_hardware("cpu", changes)


def page(
    found: Sequence[tuple[dict[str, int], Mapping[str, Steps], Mapping[int, Machine]]],
    *,
    rounds: int,
    before: tuple[str, float],
) -> str:
    """Returns the page.

    Args:
        found: shape, steps by case and rates by number of processes.
        rounds: steps of each case.
        before: commit, and load at the start.
    """
    commit, load = before
    lines = [
        "# Training over several processes of a CPU",
        "",
        "Written by `scripts/bench_scaling`.",
        "",
        f"- {datetime.date.today().isoformat()}; {cpu_name()}, {os.cpu_count()} cores, one thread a process: **4 processes are"
        f" oversubscribed**, two a core; the load before was {load:.1f}. Over 0, others used the machine too: read ratios and CPU columns.",
        f"- saekit at {commit}, torch {importlib.metadata.version('torch')} (gloo over loopback), Python {platform.python_version()}.",
        f"- float32, Adam, whole steps on the same tokens; {rounds} steps of each in turns after those that warm up and are checked;"
        " median, least and most of the slowest process.",
        "- Before: losses and gradient norms of three steps of every layout within 1e-4 of one process's.",
        "- `layers` trains one SAE a process, each on whole batches; the other layouts share one. Tokens/s count an SAE's tokens each.",
        "- Sent: by the process that sends most, as its collectives count; the model leaves figures and flags of features that fired"
        " out. Over loopback: what the kernel counted for all processes together, with headers and answers, whoever else used it.",
        "- Predicted: `saekit/training/costs.py` with nothing but the rates in the second table, medians of measurements in the same"
        " rounds by as many processes at once. It sends gradients as if not overlapped, and has no contention but what rates show.",
        "",
    ]
    for shape, steps, machines in found:
        sizes = f"N {shape['num_tokens']:,}, D {shape['d_in']}, F {shape['d_sae']:,}, k {shape['k']}"
        lines += [f"### {sizes}", "", *_steps_table(shape, steps, machines), "", *_rates_table(machines), ""]
    return "\n".join([*lines, *_h200_lines()]) + "\n"


def _steps_table(shape: dict[str, int], steps: Mapping[str, Steps], machines: Mapping[int, Machine]) -> list[str]:
    lines = [
        "| layout | processes | step, ms | CPU of all, ms | tokens/s | x one process | sent, MB | model, MB | sent / model |"
        " over loopback, MB | predicted, ms | measured / predicted |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    alone = statistics.median(steps[ALONE].wall_ms)
    for name, case in CASES.items():
        wall, predicted = statistics.median(steps[name].wall_ms), _predicted(shape, case, machines[case.processes])
        sent = sum(count for purpose, count in steps[name].sent.items() if purpose not in SMALL) / 1e6
        model = sum(_bytes(shape, case).values()) / 1e6
        loopback = statistics.median(steps[name].loopback_bytes) / 1e6
        shared = (
            [f"{sent:,.1f}", f"{model:,.1f}", f"{sent / model:.3f}", f"{loopback:,.1f}"]
            if model
            else ["0", "0", "", ""]
        )
        cells = [
            case.layout,
            str(case.processes),
            f"{wall:,.0f} ({min(steps[name].wall_ms):,.0f} - {max(steps[name].wall_ms):,.0f})",
            f"{statistics.median(steps[name].cpu_ms):,.0f}",
            f"{case.num_saes * shape['num_tokens'] / wall * 1e3:,.0f}",
            f"{case.num_saes * alone / wall:.2f}",
            *shared,
            f"{predicted.seconds * 1e3:,.0f}",
            f"{wall / (predicted.seconds * 1e3):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rates_table(machines: Mapping[int, Machine]) -> list[str]:
    lines = [
        "| each of so many processes at once gets | products, GFLOP/s | copies, GB/s | sums over gloo, GB/s sent | an operator, us |",
        "|---:|---:|---:|---:|---:|",
    ]
    for count, machine in machines.items():
        link = f"{machine.median('link') / 1e9:.2f}" if count > 1 else ""
        rates = f"{machine.median('flops') / 1e9:,.0f} | {machine.median('memory') / 1e9:.1f}"
        lines.append(f"| {count} | {rates} | {link} | {machine.median('operator_seconds') * 1e6:.1f} |")
    return lines


def _training(shape: dict[str, int]) -> tuple[TopKConfig, TrainConfig]:
    cfg = TopKConfig(d_in=shape["d_in"], d_sae=shape["d_sae"], k=shape["k"])
    return cfg, TrainConfig(num_tokens=100 * shape["num_tokens"], batch_size=shape["num_tokens"])


def _bytes(shape: dict[str, int], case: Case) -> dict[str, float]:
    cfg, config = _training(shape)
    return step_bytes(shape_of(cfg), config, data=case.data, latents=case.latents, active=shape["k"])


def _predicted(shape: dict[str, int], case: Case, machine: Machine) -> StepCost:
    cfg, config = _training(shape)
    return step_cost(
        shape_of(cfg),
        config,
        machine.hardware(case.processes),
        store=IN_MEMORY,
        num_processes=case.data * case.latents,
        latents=case.latents,
    )


def _h200_lines() -> list[str]:
    lines = [
        "## H200s: predicted, not measured",
        "",
        f"The fastest layout that the planner finds for batches of {BATCH:,} tokens, Adam, a store that is held in memory, eight devices"
        " a node; what binds is the resource that takes most of the step, with its part.",
        "",
        "| predicted, not measured | H200s | layout | tokens/s | x one | bound by |",
        "|---|---:|---|---:|---:|---|",
    ]
    for name, d_in, d_sae, k in LARGE:
        cfg = TopKConfig(d_in=d_in, d_sae=d_sae, k=k)
        config = TrainConfig(num_tokens=100 * BATCH, batch_size=BATCH)
        nodes = max(H200S) // GPUS_PER_NODE
        plan = plan_training(cfg, config, find_hardware("h200"), store=IN_MEMORY, num_nodes=nodes)
        every = (*plan.layouts, *plan.spread)
        for count in H200S:
            best = min((step for step in every if step.num_processes == count), key=lambda step: step.seconds)
            rows = count // best.latents
            layout = "data" if best.latents == 1 else "latents" if rows == 1 else f"mesh {rows} x {best.latents}"
            part = min(best.seconds_of(best.limit) / best.seconds, 1.0)
            lines.append(
                f"| {name}, F {d_sae:,}, k {k} | {count} | {layout} | {best.tokens_per_second:,.0f} |"
                f" {best.tokens_per_second / plan.layouts[0].tokens_per_second:.1f} | {best.limit}, {part:.0%} |"
            )
    return lines
