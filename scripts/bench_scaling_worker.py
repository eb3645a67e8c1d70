"""One of the processes that share trainings, driven over pipes by scripts/bench_scaling.

    python bench_scaling_worker.py RANK WORLD_SIZE PORT SHAPE_JSON

Answers lines of its input with one line of JSON each: `join` meets the other processes and builds every layout that this one has a
part in, `step CASE` does one training step of a layout, and `rates R` measures what the machine gives each of R processes at once.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from saekit.sae import Normalization, TopKConfig, TopKSAE
from saekit.training import TrainConfig
from saekit.training.layout import Layout
from saekit.training.run import TrainRun
from saekit.training.sharded import shard_sae
from saekit.training.start import estimate_normalization
from scripts.bench_scaling_cases import CASES, Case
from scripts.bench_training_worker import LEARNING_RATE, NUM_BATCHES, batches, say

MATMUL_ROWS = 1024
"""Tokens of an encoder product at a time, as the kernels do it."""
COPIED_BYTES = 64 * 2**20
"""Larger than a core's share of the caches."""
SMALL_OPERATORS = 500
REPEATS = 3


class Tokens:
    """This process's share of each batch."""

    def __init__(self, data: list[Tensor], rank: int, size: int) -> None:
        self._parts = [torch.tensor_split(batch, size)[rank].contiguous() for batch in data]
        self._number = 0

    def next_batch(self) -> Tensor:
        """Returns the next share [N / size, D]."""
        self._number += 1
        return self._parts[(self._number - 1) % NUM_BATCHES]


class Worker:
    """The process's part of every case."""

    def __init__(self, rank: int, world_size: int, shape: dict[str, int]) -> None:
        self.rank = rank
        self.shape = shape
        self.data = batches(shape)
        self.normalization: Normalization = estimate_normalization(self.data[0])
        # Every process takes part in making every group.
        self.groups = {size: dist.new_group(list(range(size))) for size in range(2, world_size + 1)}
        self.runs = {name: run for name, case in CASES.items() if (run := self._run(case)) is not None}

    def step(self, name: str) -> dict[str, Any]:
        """One whole training step: its times, figures, and what was sent."""
        case, run = CASES[name], self.runs[name]
        run.layout.traffic.take()
        self._wait(case.processes)
        wire, cpu_before, before = loopback_bytes(), time.process_time(), time.perf_counter()
        figures = run.train_step()
        seconds, cpu = time.perf_counter() - before, time.process_time() - cpu_before
        self._wait(case.processes)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "loss": figures.loss,
            "gradient_norm": figures.gradient_norm,
            "sent": run.layout.traffic.take(),
            "loopback_bytes": loopback_bytes() - wire,
        }

    def rates(self, num_processes: int) -> dict[str, float]:
        """What this process gets of the machine while as many do the same: operations and bytes a second, seconds an operator."""
        d_in, d_sae = self.shape["d_in"], self.shape["d_sae"]
        x, weight = self.data[0][:MATMUL_ROWS], torch.randn(d_sae, d_in)
        product = torch.empty(len(x), d_sae)
        source = torch.randn(COPIED_BYTES // 4)
        target, one = torch.empty_like(source), torch.ones(1)
        summed = torch.randn(d_sae * (2 * d_in + 1) + d_in)

        def operators() -> None:
            for _ in range(SMALL_OPERATORS):
                one.add_(0.0)

        found = {
            "flops": 2 * product.numel() * d_in / self._time(num_processes, lambda: torch.mm(x, weight.T, out=product)),
            "memory": 2 * COPIED_BYTES / self._time(num_processes, lambda: target.copy_(source)),
            "operator_seconds": self._time(num_processes, operators) / SMALL_OPERATORS,
        }
        if num_processes > 1:
            group = self.groups[num_processes]
            seconds = self._time(num_processes, lambda: dist.all_reduce(summed, group=group))
            found["link"] = 2 * (num_processes - 1) / num_processes * summed.nbytes / seconds
        return found

    def _run(self, case: Case) -> TrainRun | None:
        size = case.data * case.latents
        shape = torch.arange(size).reshape(case.data, case.latents)
        mesh = DeviceMesh("cpu", shape, mesh_dim_names=("data", "latents")) if size > 1 else None
        if self.rank >= case.processes:
            return None
        layout = Layout(torch.device("cpu"), mesh, self.groups[size]) if size > 1 else Layout.alone()
        cfg = TopKConfig(d_in=self.shape["d_in"], d_sae=self.shape["d_sae"], k=self.shape["k"])
        num_tokens = self.shape["num_tokens"]
        config = TrainConfig(num_tokens=10_000 * num_tokens, batch_size=num_tokens, lr=LEARNING_RATE, warmup_fraction=0)
        source = Tokens(self.data, layout.data.rank, layout.data.size)
        return TrainRun(
            shard_sae(TopKSAE(cfg), layout),
            source,  # type: ignore[arg-type]  # all that a step asks of a source
            config,
            normalization=self.normalization,
            layout=layout,
            cfg=cfg,
        )

    def _time(self, num_processes: int, work: Callable[[], object]) -> float:
        """Seconds of the work while others do the same, the middle one of some."""
        work()
        found = []
        for _ in range(REPEATS):
            self._wait(num_processes)
            before = time.perf_counter()
            work()
            found.append(time.perf_counter() - before)
        return statistics.median(found)

    def _wait(self, num_processes: int) -> None:
        if num_processes > 1:
            dist.barrier(group=self.groups[num_processes])


def loopback_bytes() -> int:
    """Bytes that went over the machine's loopback device so far, with their headers, whoever sent them."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def main() -> None:
    """Answers until its input ends."""
    rank, world_size, port, shape = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    answers = os.fdopen(os.dup(1), "w")
    # What a library prints must not get between the answers.
    os.dup2(2, 1)
    say(answers, {"version": torch.__version__})
    worker: Worker | None = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "join":
            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
            worker = Worker(rank, world_size, shape)
            say(answers, {"cases": list(worker.runs)})
            continue
        assert worker is not None, "needs `join` first"
        say(answers, worker.step(argument) if command == "step" else worker.rates(int(argument)))


if __name__ == "__main__":
    main()
