"""Whole steps of three architectures and of eai-sparsify: what is made, checked against float64, timed and written."""

import importlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import saekit_kernels as sk
import torch
from bench.run import TOLERANCE, make_weights, time_in_turns
from bench.shapes import Shape
from bench.step import BatchTopKStep, JumpReLUStep, Parameters, Step, TopKStep
from torch import Tensor

__all__ = [
    "CHECKED",
    "STEPS",
    "captured",
    "check_steps",
    "largest_step_error",
    "make_step",
    "step_lines",
    "timed_or_why",
    "whole_steps",
]

PEER = "eai-sparsify"
STEPS = ("TopK", "BatchTopK", "JumpReLU")
CHECKED = Shape("checked", 257, 96, 1111, 8)
"""Small enough for a check, and awkward."""
BANDWIDTH = 1e-3
MEMORY_GOAL, RATIO_GOAL, DECODE_GOAL = 1.2, 1.2, 2.0
BASE = "saekit TopK step"
GRAPH = "saekit TopK step, CUDA graph"
Times = dict[str, list[float]]
Failures = dict[str, str]


def make_step(
    name: str, shape: Shape, dtype: torch.dtype, *, device: str = "cuda", bandwidth: float = BANDWIDTH
) -> tuple[Step, Tensor]:
    """A step of an architecture and a batch of its own; thresholds start where about k entries of a token are active."""
    weights = make_weights(shape, device, torch.float32)
    masters = Parameters(*(tensor.detach().clone() for tensor in weights[1:]))
    x = weights.x.to(dtype)
    if name != "JumpReLU":
        kind = BatchTopKStep if name == "BatchTopK" else TopKStep
        return kind(masters, shape.k, dtype=dtype), x
    z = weights.x[:256] @ masters.W_enc_rows.T + masters.b_enc
    threshold = z.topk(shape.k, dim=1).values[:, -1].mean().clamp_min(1e-3)
    masters = masters._replace(log_threshold=threshold.log().repeat(shape.d_sae))
    return JumpReLUStep(masters, bandwidth=bandwidth, dtype=dtype), x


def dense_loss(step: Step, leaves: Parameters, x: Tensor) -> Tensor:
    """The loss of a step by torch's own dense operators, from leaves and x in float64."""
    z = x @ leaves.W_enc_rows.T + leaves.b_enc
    if isinstance(step, JumpReLUStep):
        assert leaves.log_threshold is not None
        at = leaves.log_threshold.exp()
        edge, is_active = at.detach(), z.detach() > at.detach()
        moved = ((z.detach() - edge).abs() < step.bandwidth / 2) * (edge - at) / step.bandwidth
        acts, l0 = z * is_active + edge * moved, (is_active + moved).sum() / len(x)
        return (acts @ leaves.W_dec + leaves.b_dec - x).square().mean() + step.coefficient * l0
    assert isinstance(step, TopKStep)
    positive = z.relu()
    if isinstance(step, BatchTopKStep):
        kept = positive.flatten().topk(step.k * len(x))
        acts = torch.zeros_like(z).flatten().scatter(0, kept.indices, kept.values).view_as(z)
    else:
        values, indices = positive.topk(step.k, dim=1)
        acts = torch.zeros_like(z).scatter(1, indices, values)
    return (acts @ leaves.W_dec + leaves.b_dec - x).square().mean()


def largest_step_error(step: Step, x: Tensor) -> float:
    """Largest error of a step's loss and gradients, as a fraction of the largest true value of each."""
    leaves = Parameters(*(None if leaf is None else leaf.detach().double().requires_grad_() for leaf in step.leaves))
    found, true = step.loss(x), dense_loss(step, leaves, x.double())
    mine = torch.autograd.grad(found, step.leaves.tensors())
    others = torch.autograd.grad(true, leaves.tensors())
    pairs = [(found, true), *zip(mine, others, strict=True)]
    return max(float(((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).detach()) for a, b in pairs)


def check_steps(device: str) -> None:
    """Ends the program where a loss or a gradient of any architecture is wrong; JumpReLU in a band that holds entries too."""
    for name in STEPS:
        for bandwidth in (BANDWIDTH, 0.3) if name == "JumpReLU" else (BANDWIDTH,):
            error = largest_step_error(*make_step(name, CHECKED, torch.float32, device=device, bandwidth=bandwidth))
            if not error <= TOLERANCE:
                raise SystemExit(f"{name} step: error {error:.1e}, needs at most {TOLERANCE:.0e}")


def captured(step: Step, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
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


def peer_step(shape: Shape, x: Tensor) -> Callable[[], object]:
    """A whole step of eai-sparsify as its Trainer makes it, under bfloat16 autocast with fused Adam."""
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


def decoders(shape: Shape) -> dict[str, Callable[[], Callable[[], object]]]:
    """Decode and its two gradients, ours and eai-sparsify's kernels, on the same float32 weights and entries."""

    def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights = make_weights(shape, "cuda", torch.float32)
        with torch.no_grad():
            code = sk.encode_topk(weights.x, weights.W_enc_rows.T, weights.b_enc, shape.k)
        return code.values.requires_grad_(), code.indices, weights.W_dec, torch.randn_like(weights.x)

    def ours() -> Callable[[], object]:
        values, indices, W_dec, grad = operands()
        return lambda: torch.autograd.grad(sk.decode(values, indices, W_dec), (values, W_dec), grad)

    def theirs() -> Callable[[], object]:
        decode = importlib.import_module("sparsify.utils").decoder_impl
        values, indices, W_dec, grad = operands()
        return lambda: torch.autograd.grad(decode(indices, values, W_dec.mT), (values, W_dec), grad)

    made = {"saekit": ours}
    return made | ({PEER: theirs} if is_peer_there() else {})


def is_peer_there() -> bool:
    """Whether eai-sparsify can be imported."""
    return importlib.util.find_spec("sparsify") is not None


def timed_or_why(
    makers: dict[str, Callable[[], Callable[[], object]]],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Times, Failures]:
    """Milliseconds of what can be made and run, and in a few words why the others cannot: each costs its own row alone."""
    ready: dict[str, Callable[[], object]] = {}
    failures: Failures = {}
    for name, make in makers.items():
        try:
            run = make()
            run()
            ready[name] = run
        except torch.OutOfMemoryError:
            failures[name] = "out of memory"
        except Exception as error:  # a peer may fail in any way, and what is measured of others counts
            failures[name] = f"failed: {type(error).__name__}"
        if name in failures and device == "cuda":
            torch.cuda.empty_cache()
    timed = time_in_turns(ready, rounds, device, clock) if ready else {}
    return {name: times for name, (times, _) in timed.items()}, failures


def step_lines(times: Times, failures: Failures, names: list[str], *, base: str, title: str) -> list[str]:
    """Markdown table, one row for each of `names`: median, least and most, ratio to `base`."""
    lines = [f"| {title} | milliseconds | x {base} |", "|---|---|---|"]
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name in names:
        if name not in times:
            lines.append(f"| {name} | {failures.get(name, 'not measured')} | - |")
            continue
        ratio = f"{middle[name] / middle[base]:.2f}" if base in middle else "-"
        lines.append(f"| {name} | {middle[name]:.2f} ({min(times[name]):.2f} - {max(times[name]):.2f}) | {ratio} |")
    return [*lines, ""]


def whole_steps(shape: Shape, rounds: int) -> list[str]:
    """Markdown lines: a step of each architecture, TopK's as a CUDA graph, the peer's, its decoder's, and our memory."""
    dtype = torch.bfloat16

    def eager(name: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            step, x = make_step(name, shape, dtype)
            return lambda: step(x)

        return make

    def matmul() -> Callable[[], object]:
        step, x = make_step("TopK", shape, dtype)
        rows = step.leaves.W_enc_rows.detach()
        return lambda: x @ rows.T

    def graph() -> Callable[[], object]:
        step, x = make_step("TopK", shape, dtype)
        replayed, _ = captured(step, x)
        # Its memory is that of these tensors.
        return lambda kept=(step, x): replayed.replay()

    memory = _memory_line(shape, dtype)
    makers = {"encoder matmul alone": matmul, GRAPH: graph} | {f"saekit {name} step": eager(name) for name in STEPS}
    peer = f"{PEER} step"
    if is_peer_there():
        makers[peer] = lambda: peer_step(shape, make_step("TopK", shape, dtype)[1])
    times, failures = timed_or_why(makers, rounds, "cuda")
    failures.setdefault(peer, "not installed")
    names = [*makers, *([] if peer in makers else [peer])]
    lines = step_lines(times, failures, names, base=BASE, title="whole step, bfloat16")
    lines += [
        f"- Goal of BatchTopK and JumpReLU (bandwidth {BANDWIDTH:g}): at most {RATIO_GOAL:.2f} times TopK's eager step. Their "
        "encoders wait for the number of entries that they keep, so they are no CUDA graph.",
        memory,
        "",
    ]
    makers = decoders(shape)
    times, failures = timed_or_why(makers, rounds, "cuda")
    failures.setdefault(PEER, "not installed")
    title = "decode, forward and backward, float32"
    lines += step_lines(times, failures, ["saekit", PEER], base="saekit", title=title)
    return [*lines, f"- Goal: at least {DECODE_GOAL:.1f} times faster than {PEER}'s.", ""]


def _memory_line(shape: Shape, dtype: torch.dtype) -> str:
    torch.cuda.empty_cache()
    try:
        step, x = make_step("TopK", shape, dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(x)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "- peak of a TopK step: out of memory"
    peak, state = torch.cuda.max_memory_allocated(), step.num_state_bytes
    return (
        f"- peak of a TopK step {peak / 2**20:,.0f} MiB, {peak / state:.2f} times weights, copies and moments; goal: at most "
        f"{MEMORY_GOAL:.2f}"
    )
