"""A TopK step never waits for the device, and runs as one CUDA graph where there is a device."""

import importlib
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from bench.step import Parameters, TopKStep

from tests.kernels.waits import Waits


def make_step(problem: Any, k: int, **options: Any) -> TopKStep:
    return TopKStep(Parameters(*problem[1:]), k, lr=1e-2, backend="triton", **options)


@pytest.mark.parametrize("encoder", ["fused", "two-kernel"])
def test_topk_step_in_triton_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, device: str, encoder: str, make_problem: Any
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("SAEKIT_KERNELS_ENCODER", encoder)
    # Indices are checked on the CPU alone.
    monkeypatch.setattr(importlib.import_module("saekit_kernels.decode"), "_check_code", lambda *operands: None)
    problem = make_problem(2, 4, 33).to(torch.float32, device)
    step = make_step(problem, 2, dtype=torch.bfloat16)
    with Waits() as waits:
        step(problem.x.detach())
    assert waits.names == []


def test_what_waits_is_seen(make_problem: Any) -> None:
    values = torch.tensor([1.0, -1.0])
    with Waits() as waits:
        values[values > 0]
        values.max().item()
        torch.tensor(1.0)
    assert len(waits.names) == 3


def test_adam_with_numbers_on_the_device_equals_adam(backend: Any, device: str, make_problem: Any) -> None:
    """Learning rate, number of the step and scale as tensors, over three steps."""
    results = []
    for is_tensor in (False, True):
        weight = make_problem(1, 6, 5).W_dec.float().to(device)
        moments = torch.zeros_like(weight), torch.zeros_like(weight)
        for number in range(1, 4):
            lr: Any = torch.tensor(0.01, device=device) if is_tensor else 0.01
            count: Any = torch.tensor(number, device=device) if is_tensor else number
            scale: Any = torch.tensor(0.5, device=device) if is_tensor else 0.5
            step = sk.AdamStep(lr=lr, number=count)
            sk.adam_step(
                weight,
                weight.sin(),
                exp_avg=moments[0],
                exp_avg_sq=moments[1],
                step=step,
                scale=scale,
                backend=backend,
            )
        results.append(weight)
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=2e-7)


def test_step_lowers_the_loss_and_keeps_unit_rows(make_problem: Any) -> None:
    problem = make_problem(60, 8, 40).to(torch.float32)
    masters = Parameters(*problem[1:])
    masters.W_dec.data /= masters.W_dec.data.norm(dim=1, keepdim=True)
    step = TopKStep(masters, 4, dtype=torch.bfloat16, lr=1e-2, backend="cpu")
    losses = [float(step(problem.x.detach())) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(step.masters.W_dec.norm(dim=1), torch.ones(40))
    assert int(step.number) == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
def test_topk_step_as_a_cuda_graph_equals_eager_steps() -> None:
    from bench import gpu

    gpu.check_waits()
    gpu.check_graph()
