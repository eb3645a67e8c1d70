"""Measures the parts of a TopK step, what a fixed order of sums costs, and what 8-bit candidates cost; writes a table.

From the folder `kernels`: python -m bench.parts [--shape NAME ...] [--device cpu|cuda] [--clock wall|cpu] [--out FILE]

As in `bench.run`, results are checked first and the variants take turns.
"""

import argparse
import datetime
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import saekit_kernels as sk
import torch
from bench.run import TOLERANCE, Weights, largest_error, make_weights, time_in_turns, versions
from bench.shapes import CPU_SHAPES, GPU_SHAPES, TEST_SHAPES, Shape
from saekit_kernels import _candidates
from saekit_kernels._quantize import Kind
from saekit_kernels.backend import load_primitives
from saekit_kernels.sparse_code import entries_of
from torch import Tensor

MATMUL = "encoder matmul alone"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KINDS: tuple[Kind, ...] = ("int8", "fp8")
# Of the features, in the row of AuxK.
DEAD_FRACTION = 0.05


def parts(shape: Shape, weights: Weights) -> dict[str, Callable[[], object]]:
    """What is timed, by name; all but the candidates are what a step calls."""
    x, W_enc_rows, b_enc, W_dec, b_dec = (tensor.detach() for tensor in weights)
    primitives = load_primitives(sk.resolve_backend("auto", x, W_enc_rows, b_enc, W_dec))
    code = sk.encode_topk(x, W_enc_rows.T, b_enc, shape.k)
    entries = entries_of(code.indices, None, is_unique=True)
    reverse = sk.ReverseIndex(entries, shape.d_sae)
    grad = torch.randn_like(x)
    keys = code.indices.flatten().to(torch.int32)
    moments = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    moved, step = W_dec.clone(), sk.AdamStep(lr=1e-4, number=1, is_unit_norm=True)
    dead = torch.arange(0, shape.d_sae, round(1 / DEAD_FRACTION), device=x.device)
    few = [W_enc_rows[dead].requires_grad_(), b_enc[dead].requires_grad_(), W_dec[dead].requires_grad_()]

    def index_add() -> Tensor:
        contributions = code.values.flatten()[:, None].to(grad.dtype) * grad.repeat_interleave(shape.k, dim=0)
        return torch.zeros_like(W_dec).index_add_(0, code.indices.flatten(), contributions)

    def auxk() -> object:
        made = sk.auxk(x, few[0].T, few[1], few[2], shape.d_in // 2)
        return torch.autograd.grad(made.square().sum(), few)

    timed: dict[str, Callable[[], object]] = {
        MATMUL: lambda: x @ W_enc_rows.T,
        "top-k encode": lambda: sk.encode_topk(x, W_enc_rows.T, b_enc, shape.k),
        "decode": lambda: sk.decode(code.values, code.indices, W_dec, b_dec),
        "gradient of the values": lambda: primitives.gather_dot(grad, entries, W_dec, dtype=torch.float32),
        "gradient of W_dec, in token order": lambda: primitives.scatter_sum(
            code.values, reverse, grad, dtype=torch.float32
        ),
        "the same by index_add_, in any order": index_add,
        "entries by feature, stable sort": lambda: torch.sort(keys, stable=True),
        "the same, sort in any order": lambda: torch.sort(keys, stable=False),
        "optimizer pass of W_dec": lambda: sk.adam_step(
            moved, W_dec, exp_avg=moments[0], exp_avg_sq=moments[1], step=step
        ),
        "norm of W_dec's gradient": lambda: sk.gradient_square(W_dec, moved),
        f"AuxK over {len(dead)} features, forward + backward": auxk,
    }
    for kind in KINDS:
        scored = functools.partial(sk.encode_topk, candidates=kind)
        timed[f"top-k encode, {kind} candidates"] = functools.partial(scored, x, W_enc_rows.T, b_enc, shape.k)
    return timed


def candidate_facts(shape: Shape, weights: Weights) -> list[str]:
    """Lines on what 8-bit candidates proved; ends the program if they select other values than the plain path."""
    x, W_enc_rows, b_enc = (tensor.detach() for tensor in weights[:3])
    plain = sk.encode_topk(x, W_enc_rows.T, b_enc, shape.k)
    primitives = load_primitives(sk.resolve_backend("auto", x, W_enc_rows, b_enc))
    lines = []
    for kind in KINDS:
        found = sk.encode_topk(x, W_enc_rows.T, b_enc, shape.k, candidates=kind)
        error = float((found.values - plain.values).abs().max() / plain.values.abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"{shape.name}, {kind}: values differ by {error:.1e}, needs at most {TOLERANCE:.0e}")
        proven = _candidates.proven_topk(primitives, x, W_enc_rows, b_enc, shape.k, kind)[2].double().mean()
        count = _candidates.CANDIDATES_PER_ENTRY * shape.k
        lines.append(
            f"{kind}: {count} candidates a token prove {float(proven):.1%} of the tokens; the result is the same"
        )
    return lines


def table(timed: dict[str, tuple[list[float], float | None]]) -> list[str]:
    """Markdown lines, one row a part."""
    base = statistics.median(timed[MATMUL][0])
    lines = ["| part | milliseconds | x matmul | peak MiB |", "|---|---|---|---|"]
    for name, (times, peak) in timed.items():
        middle = statistics.median(times)
        spread = f"{middle:,.2f} ({min(times):,.2f} - {max(times):,.2f})"
        lines.append(f"| {name} | {spread} | {middle / base:.2f} | {'-' if peak is None else f'{peak:,.0f}'} |")
    return lines


def order_cost(timed: dict[str, tuple[list[float], float | None]]) -> str:
    """One line: what the fixed order of all sums costs, of the parts that make it."""
    stable, any_order = (
        statistics.median(timed[name][0]) for name in ("entries by feature, stable sort", "the same, sort in any order")
    )
    share = (stable - any_order) / statistics.median(timed["top-k encode"][0])
    return (
        f"fixed order of sums: {stable - any_order:+.2f} ms for the stable sort, {share:+.2%} of the encoder; "
        "the sums themselves have one order in any case"
    )


def gate(device: str) -> None:
    """Ends the program where a loss or gradient is wrong."""
    for shape in TEST_SHAPES:
        error = largest_error(shape, device)
        if not error <= TOLERANCE:
            raise SystemExit(f"{shape.name}: error {error:.1e}, needs at most {TOLERANCE:.0e}")


def section(shape: Shape, device: str, dtype: torch.dtype, rounds: int, clock: Callable[[], float]) -> list[str]:
    """Markdown lines of one shape."""
    weights = make_weights(shape, device, dtype)
    facts = candidate_facts(shape, weights)
    timed = time_in_turns(parts(shape, weights), rounds, device, clock)
    heading = f"### N {shape.num_tokens:,}, D {shape.d_in:,}, F {shape.d_sae:,}, k {shape.k}, {str(dtype)[6:]}"
    return [heading, "", *table(timed), "", f"- {order_cost(timed)}", *(f"- {fact}" for fact in facts), ""]


def main(arguments: list[str] | None = None) -> int:
    """Checks, measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {shape.name: shape for shape in (*TEST_SHAPES, *CPU_SHAPES, *GPU_SHAPES)}
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", choices=sorted(shapes), help="default: all of the device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: the time of this process alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/kernels_<device>.md")
    options = parser.parse_args(arguments)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    facts = versions(options.device) | {"clock": options.clock}
    gate(options.device)
    lines = ["# Parts of a TopK step", "", "Written by `python -m bench.parts` in `kernels/`.", ""]
    lines += [
        f"- {datetime.date.today().isoformat()}; " + ", ".join(f"{name} {value}" for name, value in facts.items())
    ]
    lines += [f"- {options.rounds} calls each in turns after one that warms up; median, least and most.", ""]
    default = CPU_SHAPES if options.device == "cpu" else GPU_SHAPES
    for shape in [shapes[name] for name in options.shape or ()] or default:
        lines += section(shape, options.device, torch.float32, options.rounds, clock)
    if options.device == "cpu":
        lines += ["### On a GPU", "", "Not measured: `scripts/bench_gpu` writes `gpu.md`.", ""]
    out = options.out or BENCHMARKS / f"kernels_{options.device}.md"
    out.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
