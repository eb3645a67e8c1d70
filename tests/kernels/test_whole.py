"""Whole steps of the GPU bench, on the CPU: their losses and gradients, what waits, and a table that a failure costs one row."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from bench import whole
from bench.shapes import Shape
from bench.step import JumpReLUStep

from tests.kernels.waits import Waits

SMALL = Shape("small", 40, 24, 90, 4)
TINY = Shape("tiny", 3, 5, 9, 2)


def test_steps_have_the_gradients_of_dense_float64_autograd() -> None:
    whole.check_steps("cpu")


@pytest.mark.parametrize("name", ["BatchTopK", "JumpReLU"])
def test_a_step_with_a_wrong_gradient_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sk.decode

    def off_by_little(values: torch.Tensor, *operands: Any, **options: Any) -> torch.Tensor:
        is_wrong = name == "BatchTopK" or values.numel() > 9 * whole.CHECKED.num_tokens
        offsets = options.get("offsets")
        return right(values * (1.001 if offsets is not None and is_wrong else 1.0), *operands, **options)

    monkeypatch.setattr(sk, "decode", off_by_little)
    with pytest.raises(SystemExit, match=r"needs at most 1e-05"):
        whole.check_steps("cpu")


def test_straight_through_set_moves_thresholds_in_float32() -> None:
    step, x = whole.make_step("JumpReLU", SMALL, torch.float16, device="cpu", bandwidth=0.5)
    assert isinstance(step, JumpReLUStep)
    assert step.masters.log_threshold is not None
    before = step.masters.log_threshold.clone()
    losses = [float(step(x)) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert step.masters.log_threshold.dtype == torch.float32
    assert (step.masters.log_threshold != before).float().mean() > 0.5
    assert step.leaves.W_dec.dtype == torch.float16
    torch.testing.assert_close(step.leaves.W_dec.detach(), step.masters.W_dec.half())


def test_batch_topk_step_follows_the_smallest_kept_entry() -> None:
    step, x = whole.make_step("BatchTopK", whole.CHECKED, torch.float32, device="cpu")
    losses = [float(step(x)) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert float(step.threshold) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["BatchTopK", "JumpReLU"])
def test_nothing_but_the_encoder_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    step, x = whole.make_step(name, TINY, torch.float32, device="cpu")
    step.backend = "triton"
    which = "encode_batch_topk" if name == "BatchTopK" else "encode_threshold"
    code = None

    def encoded(*operands: Any, **options: Any) -> Any:
        return code

    encoder = getattr(sk, which)
    leaves = step.leaves
    with torch.no_grad():
        if isinstance(step, JumpReLUStep):
            assert leaves.log_threshold is not None
            code = encoder(x, leaves.W_enc_rows.T, leaves.b_enc, leaves.log_threshold.exp(), bandwidth=step.bandwidth)
        else:
            code = encoder(x, leaves.W_enc_rows.T, leaves.b_enc, TINY.k)
    monkeypatch.setattr(sk, which, encoded)
    # Indices are checked on the CPU alone.
    monkeypatch.setattr(importlib.import_module("saekit_kernels.decode"), "_check_code", lambda *operands: None)
    with Waits() as waits:
        step.loss(x)
    assert waits.names == []


def test_memory_of_a_step_counts_weights_copies_and_moments() -> None:
    shape = whole.CHECKED
    num = 2 * shape.d_in * shape.d_sae + shape.d_sae + shape.d_in
    for dtype, size in ((torch.float32, 12), (torch.bfloat16, 14)):
        assert whole.make_step("TopK", shape, dtype, device="cpu")[0].num_state_bytes == size * num


def make_failing(error: Exception) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        raise error

    return make


def test_what_cannot_run_costs_one_row() -> None:
    ticks = itertools.count()
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "ours": lambda: lambda: None,
        "large": make_failing(torch.OutOfMemoryError("CUDA out of memory")),
        "peer": make_failing(AttributeError("no decoder_impl")),
    }
    times, failures = whole.timed_or_why(makers, 2, "cpu", lambda: float(next(ticks)))
    assert times == {"ours": [1000.0, 1000.0]}
    names = [*makers, "absent"]
    lines = whole.step_lines(times, failures | {"absent": "not installed"}, names, base="ours", title="step")
    assert lines[2:-1] == [
        "| ours | 1000.00 (1000.00 - 1000.00) | 1.00 |",
        "| large | out of memory | - |",
        "| peer | failed: AttributeError | - |",
        "| absent | not installed | - |",
    ]
