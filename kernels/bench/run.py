"""Measures the ops against a dense autograd step: correctness first, then medians and spread, in turns.

From the folder `kernels`: python -m bench.run [--shape NAME ...] [--device cpu|cuda] [--rounds 9] [--compile] [--json FILE]

Every round times each variant once, so that a busy machine slows all of them alike. Prints one row a variant with its
ratio to the encoder's matrix product alone, which no exact encoder can do without. On a CPU that others use too, take
OMP_NUM_THREADS=1 and --clock cpu: the process's own time, which waiting for a turn does not lengthen.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import saekit_kernels as sk
import torch
from bench.shapes import CPU_SHAPES, GPU_SHAPES, TEST_SHAPES, Shape
from torch import Tensor

# Largest error of the loss or a gradient, as a fraction of the largest true value, for float32 operands.
TOLERANCE = 1e-5


class Weights(NamedTuple):
    """Operands as an SAE holds them; W_enc_rows is [F, D]."""

    x: Tensor
    W_enc_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def clear(self) -> None:
        for tensor in self:
            tensor.grad = None


class Figure(NamedTuple):
    """One row of the table; milliseconds."""

    shape: str
    variant: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio_to_matmul: float
    peak_mib: float | None


def make_weights(shape: Shape, device: str, dtype: torch.dtype) -> Weights:
    """A nearly tied unit-norm dictionary and tokens with a few strong directions, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    d_in, d_sae = shape.d_in, shape.d_sae
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    mixing = torch.randn(d_in, d_in, generator=generator) / d_in**0.5
    x = torch.randn(shape.num_tokens, d_in, generator=generator) @ mixing
    # Exactly tied, one kept feature reconstructs its own direction exactly: its gradient is pure rounding.
    decoder = torch.nn.functional.normalize(rows + torch.randn(d_sae, d_in, generator=generator) / d_in**0.5, dim=1)
    drawn = x, rows, 0.01 * torch.randn(d_sae, generator=generator), decoder, torch.zeros(d_in)
    tensors = [tensor.to(device, dtype) for tensor in drawn]
    return Weights(tensors[0], *(tensor.requires_grad_() for tensor in tensors[1:]))


def sparse_loss(weights: Weights, k: int, backend: sk.Backend = "auto") -> Tensor:
    code = sk.encode_topk(weights.x, weights.W_enc_rows.T, weights.b_enc, k, backend=backend)
    x_hat = sk.decode(code.values, code.indices, weights.W_dec, weights.b_dec, backend=backend)
    return (x_hat - weights.x).square().mean()


def dense_loss(weights: Weights, k: int) -> Tensor:
    """The same loss with torch's own operators: topk, scatter and a dense decode."""
    z = weights.x @ weights.W_enc_rows.T + weights.b_enc
    values, indices = z.topk(k, dim=1)
    acts = torch.zeros_like(z).scatter(1, indices, values.relu())
    return (acts @ weights.W_dec + weights.b_dec - weights.x).square().mean()


def threshold_loss(weights: Weights, threshold: Tensor) -> Tensor:
    code = sk.encode_threshold(weights.x, weights.W_enc_rows.T, weights.b_enc, threshold)
    x_hat = sk.decode(code.pre_acts, code.indices, weights.W_dec, weights.b_dec, offsets=code.offsets)
    return (x_hat - weights.x).square().mean()


def largest_error(shape: Shape, device: str) -> float:
    """Largest relative error of the loss and of its gradients against dense autograd in float64."""
    mine = make_weights(shape, device, torch.float32)
    truth = Weights(*(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in mine))
    found, expected = sparse_loss(mine, shape.k), dense_loss(truth, shape.k)
    found.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    expected.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    pairs = [(found, expected), *((one.grad, other.grad) for one, other in zip(mine, truth, strict=True))]
    errors = []
    for one, other in pairs:
        if one is not None and other is not None:
            scale = other.abs().max().clamp(min=1e-30)
            errors.append(float(((one.double() - other).abs().max() / scale).detach()))
    return max(errors)


def time_in_turns(
    variants: dict[str, Callable[[], object]], rounds: int, device: str, clock: Callable[[], float]
) -> dict[str, tuple[list[float], float | None]]:
    """Milliseconds of each round, and peak MiB on the device, of each variant after one warm-up call."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, float | None] = dict.fromkeys(variants)
    for round_number in range(rounds + 1):
        for name, run in variants.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
            if round_number:
                times[name].append((clock() - start) * 1e3)
    return {name: (times[name], peaks[name]) for name in variants}


def measure(
    shape: Shape, device: str, dtype: torch.dtype, *, rounds: int, with_compile: bool, clock: Callable[[], float]
) -> list[Figure]:
    """The table's rows of one shape."""
    weights = make_weights(shape, device, dtype)
    k = shape.k
    with torch.no_grad():
        z = weights.x[:256] @ weights.W_enc_rows.T + weights.b_enc
        threshold = z.topk(k, dim=1).values[:, -1].mean().float().repeat(shape.d_sae)

    def step(loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            weights.clear()
            loss_of().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

        return run

    matmul = "encoder matmul alone"
    variants: dict[str, Callable[[], object]] = {
        matmul: lambda: weights.x @ weights.W_enc_rows.detach().T,
        "top-k forward": lambda: sparse_loss(weights, k),
        "top-k forward + backward": step(lambda: sparse_loss(weights, k)),
        "threshold forward + backward": step(lambda: threshold_loss(weights, threshold)),
        "dense autograd forward + backward": step(lambda: dense_loss(weights, k)),
    }
    if device == "cpu":
        # Beside what "auto" takes, which is the compiled kernels where they can be built.
        variants["top-k forward + backward, torch operators"] = step(lambda: sparse_loss(weights, k, "cpu"))
    if with_compile:
        compiled = torch.compile(dense_loss)
        variants["dense, torch.compile, forward + backward"] = step(lambda: compiled(weights, k))
    measured = time_in_turns(variants, rounds, device, clock)
    base = statistics.median(measured[matmul][0])
    return [
        Figure(shape.name, name, (mid := statistics.median(times)), min(times), max(times), mid / base, peak)
        for name, (times, peak) in measured.items()
    ]


def versions(device: str) -> dict[str, str]:
    """Everything a figure needs beside it to count."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    cpu_lines = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "commit": revision.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else (cpu_lines or ["unknown"])[0].split(":")[-1].strip(),
        "threads": str(torch.get_num_threads()),
        "load": _read("/proc/loadavg").split(" ")[0],
        "backend": sk.resolve_backend("auto", torch.zeros(1, device=device)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; 1 if a result is wrong, before anything is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {shape.name: shape for shape in (*TEST_SHAPES, *CPU_SHAPES, *GPU_SHAPES)}
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", choices=sorted(shapes), help="default: all of the device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the time of this process alone")
    parser.add_argument("--compile", action="store_true", help="also time the dense step under torch.compile")
    parser.add_argument("--json", type=Path, help="write versions and figures here")
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and options.device == "cuda":
        parser.error("--clock cpu: the device's time does not show in it, needs --clock wall with --device cuda")
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    facts = versions(options.device) | {"clock": options.clock}
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    for shape in TEST_SHAPES:
        error = largest_error(shape, options.device)
        if not error <= TOLERANCE:
            print(f"{shape.name}: error {error:.1e}, needs at most {TOLERANCE:.0e}", file=sys.stderr)
            return 1
    print(f"correct: {len(TEST_SHAPES)} shapes, loss and gradients within {TOLERANCE:.0e} of dense float64 autograd")
    chosen = [shapes[name] for name in options.shape or ()] or (CPU_SHAPES if options.device == "cpu" else GPU_SHAPES)
    figures: list[Figure] = []
    for shape in chosen:
        print(f"\n{shape.name}: N {shape.num_tokens}, D {shape.d_in}, F {shape.d_sae}, k {shape.k}, {options.dtype}")
        dtype: torch.dtype = getattr(torch, options.dtype)
        figures += measure(
            shape, options.device, dtype, rounds=options.rounds, with_compile=options.compile, clock=clock
        )
        for row in figures:
            if row.shape == shape.name:
                spread = f"{row.low_ms:.1f} - {row.high_ms:.1f}"
                print(f"  {row.variant:42} {row.median_ms:9.1f} ms  ({spread:17})  {row.ratio_to_matmul:6.2f} x matmul")
    if options.json:
        table = [row._asdict() for row in figures]
        options.json.write_text(json.dumps({"versions": facts, "figures": table}, indent=1) + "\n", encoding="utf-8")
    return 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main())
