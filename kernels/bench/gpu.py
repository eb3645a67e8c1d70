"""Measures kernels and whole TopK steps on a CUDA device, against eai-sparsify where it is installed; writes benchmarks/gpu.md.

Run by scripts/bench_gpu. Results are checked first: losses and gradients against float64, a step that waits for nothing, and a
CUDA graph of the step against eager steps. The file is written after every part, so that what was measured is kept.
"""

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.parts import BENCHMARKS, gate, section
from bench.run import make_weights, time_in_turns, versions
from bench.shapes import GPU_SHAPES, Shape
from bench.step import Parameters, TopKStep
from torch import Tensor

SHAPES = {shape.name: shape for shape in GPU_SHAPES}
DEFAULT_SHAPES = ["gpt2-24k", "gemma2-2b-65k"]
PEER = "eai-sparsify"
# Small enough for a check, and awkward.
CHECKED = Shape("checked", 257, 96, 1111, 8)


def make_step(shape: Shape, dtype: torch.dtype) -> tuple[TopKStep, Tensor]:
    """A step and a batch of its own, on the device."""
    weights = make_weights(shape, "cuda", torch.float32)
    masters = Parameters(*(tensor.detach().clone() for tensor in weights[1:]))
    return TopKStep(masters, shape.k, dtype=dtype), weights.x.to(dtype)


def captured(step: TopKStep, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The step as a CUDA graph on the memory of x, and the loss that it writes; three steps are made before it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x)
    return graph, loss


def check_waits() -> None:
    """Raises where a step waits for the device."""
    step, x = make_step(CHECKED, torch.bfloat16)
    step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph() -> None:
    """Ends the program where replays of a graph differ from eager steps in any bit."""
    (eager, x), (graphed, static) = make_step(CHECKED, torch.float32), make_step(CHECKED, torch.float32)
    graph, _ = captured(graphed, static)
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        eager(x)
    torch.cuda.synchronize()
    for name, one, other in zip(Parameters._fields, eager.masters, graphed.masters, strict=True):
        if not torch.equal(one, other):
            raise SystemExit(f"CUDA graph: {name} differs from that of eager steps, needs the same bits")


def peer_step(shape: Shape, x: Tensor) -> Callable[[], object] | None:
    """A whole step of eai-sparsify as its Trainer makes it, under bfloat16 autocast with fused Adam; None where it is missing."""
    if importlib.util.find_spec("sparsify") is None:
        return None
    module: Any = importlib.import_module("sparsify")
    config = module.SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    sae = module.SparseCoder(shape.d_in, config, device="cuda", dtype=torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4, fused=True)
    silent = torch.zeros(shape.d_sae, dtype=torch.long, device="cuda")

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = sae(x)
        out.fvu.backward()
        fired = torch.zeros_like(silent, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        silent.add_(len(x))
        silent[fired] = 0
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def whole_steps(shape: Shape, rounds: int) -> list[str]:
    """Markdown lines: a step eager and as a CUDA graph, the peer's, and the memory that ours takes."""
    torch.cuda.empty_cache()
    step, x = make_step(shape, torch.bfloat16)
    state = sum(3 * tensor.nbytes + tensor.numel() * 2 for tensor in step.masters)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(x)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    static = x.clone()
    graph, _ = captured(step, static)
    variants: dict[str, Callable[[], object]] = {
        "encoder matmul alone": lambda: x @ step.masters.W_enc_rows.to(x.dtype).T,
        "saekit step": lambda: step(x),
        "saekit step, CUDA graph": graph.replay,
    }
    peer = peer_step(shape, x)
    if peer is not None:
        variants[f"{PEER} {importlib.metadata.version(PEER)} step"] = peer
    timed = time_in_turns(variants, rounds, "cuda", time.perf_counter)
    ours = statistics.median(timed["saekit step, CUDA graph"][0])
    lines = ["| whole step, bfloat16 | milliseconds | x ours, CUDA graph |", "|---|---|---|"]
    for name, (times, _) in timed.items():
        middle = statistics.median(times)
        lines.append(f"| {name} | {middle:.2f} ({min(times):.2f} - {max(times):.2f}) | {middle / ours:.2f} |")
    lines += ["", f"- peak of a step {peak / 2**20:,.0f} MiB, {peak / state:.2f} times weights, copies and moments"]
    if peer is None:
        lines += [f"- {PEER} is not installed: not measured"]
    return [*lines, ""]


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
    facts = ", ".join(f"{name} {value}" for name, value in versions("cuda").items())
    lines = [
        "# TopK on a GPU",
        "",
        "Written by `scripts/bench_gpu`.",
        "",
        f"- {datetime.date.today().isoformat()}; {facts}",
    ]
    gate("cuda")
    check_waits()
    check_graph()
    lines += [
        "- Before: losses and gradients within 1e-5 of dense float64 autograd; no part of a step waits for the device "
        "(torch.cuda.set_sync_debug_mode); five replays of a CUDA graph give the bits of eager steps.",
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
            lines += measure()
            options.out.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    options.out.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
