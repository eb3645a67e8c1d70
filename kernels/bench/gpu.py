"""Measures kernels and whole steps on a CUDA device, against eai-sparsify where it is installed; writes benchmarks/gpu.md.

Run by scripts/bench_gpu. Results are checked first: losses and gradients against float64, a TopK step that waits for nothing, and a
CUDA graph of the step against eager steps. The file is written after every part, so that what was measured is kept.
"""

import argparse
import datetime
import functools
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from bench.parts import BENCHMARKS, gate, section
from bench.run import versions
from bench.shapes import GPU_SHAPES
from bench.step import Parameters
from bench.whole import CHECKED, captured, check_steps, make_step, whole_steps

SHAPES = {shape.name: shape for shape in GPU_SHAPES}
DEFAULT_SHAPES = ["gpt2-24k", "gemma2-2b-65k"]


def check_waits() -> None:
    """Raises where a TopK step waits for the device."""
    step, x = make_step("TopK", CHECKED, torch.bfloat16)
    step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph() -> None:
    """Ends the program where replays of a graph differ from eager steps in any bit."""
    (eager, x), (graphed, static) = make_step("TopK", CHECKED, torch.float32), make_step("TopK", CHECKED, torch.float32)
    graph, _ = captured(graphed, static)
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        eager(x)
    torch.cuda.synchronize()
    names = Parameters._fields
    for name, one, other in zip(names, eager.masters.tensors(), graphed.masters.tensors(), strict=False):
        if not torch.equal(one, other):
            raise SystemExit(f"CUDA graph: {name} differs from that of eager steps, needs the same bits")


def count_waits(name: str) -> int:
    """How often a step of an architecture waits for the device."""
    step, x = make_step(name, CHECKED, torch.bfloat16)
    step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def driver_version() -> str:
    """The driver's, as nvidia-smi names it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        found = []
    return found[0] if found else "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Checks, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", action="append", choices=sorted(SHAPES), help=f"default: {', '.join(DEFAULT_SHAPES)}"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=480, help="start no part after these (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "gpu.md")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("scripts/bench_gpu: torch finds no CUDA device, needs one", file=sys.stderr)
        return 2
    started = time.monotonic()
    found = versions("cuda") | {"driver": driver_version(), "CUDA": str(torch.version.cuda)}
    facts = ", ".join(f"{name} {value}" for name, value in found.items())
    lines = [
        "# Kernels and whole steps on a GPU",
        "",
        "Written by `scripts/bench_gpu`.",
        "",
        f"- {datetime.date.today().isoformat()}; {facts}",
    ]
    gate("cuda")
    check_steps("cuda")
    check_waits()
    check_graph()
    waits = ", ".join(f"{name} {count_waits(name)}" for name in ("BatchTopK", "JumpReLU"))
    lines += [
        "- Before: losses and gradients, of each architecture's step too, within 1e-5 of dense float64 autograd; no part of a "
        f"TopK step waits for the device (torch.cuda.set_sync_debug_mode), a step of the others so often: {waits}; five replays of a CUDA graph give the bits of eager steps.",
        f"- {options.rounds} calls each in turns after one that warms up; median, least and most; wall time with the device's.",
        "",
    ]
    for name in options.shape or DEFAULT_SHAPES:
        shape = SHAPES[name]
        measures: list[Callable[[], list[str]]] = [
            functools.partial(section, shape, "cuda", torch.bfloat16, options.rounds, time.perf_counter),
            functools.partial(whole_steps, shape, options.rounds),
        ]
        for measure in measures:
            if time.monotonic() - started > options.seconds:
                lines += [f"- {name}: a part was not started, {options.seconds:.0f} s were over", ""]
                continue
            try:
                lines += measure()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                lines += [f"- {name}: a part ran out of memory", ""]
            options.out.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    options.out.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
