"""A TopK step never waits for the device, and runs as one CUDA graph where there is a device."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read a value, or a number of values, from the device.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "is_nonzero", "unique", "bincount")


class Waits(TorchDispatchMode):
    """Records the operators that would wait for a device, and the host's numbers that would be copied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        is_masked = name.startswith(("aten.index.", "aten.index_put")) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1] or ()
        )
        if is_masked or any(word in name for word in WAITING) or "lift_fresh" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def make_step(problem: Any, k: int, backend: Any) -> Callable[[Tensor], Tensor]:
    """A whole TopK step, with clipping and Adam, all of whose numbers are on the device."""
    device = problem.x.device
    parameters = problem[1:]
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]
    number = torch.zeros((), dtype=torch.int64, device=device)
    lr = torch.full((), 1e-2, device=device)

    def step(x: Tensor) -> Tensor:
        code = sk.encode_topk(x, problem.W_enc_rows.T, problem.b_enc, k, backend=backend)
        x_hat = sk.decode(code.values, code.indices, problem.W_dec, problem.b_dec, backend=backend)
        loss = (x_hat - x).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        number.add_(1)
        unit = [position == 2 for position in range(4)]
        squares = [
            sk.gradient_square(grad, parameter.detach() if is_unit else None, backend=backend)
            for grad, parameter, is_unit in zip(gradients, parameters, unit, strict=True)
        ]
        scale = (1.0 / torch.stack(squares).sum().sqrt()).clamp(max=1.0)
        for parameter, grad, (mean, square), is_unit in zip(parameters, gradients, moments, unit, strict=True):
            update = sk.AdamStep(lr=lr, number=number, is_unit_norm=is_unit)
            sk.adam_step(
                parameter.detach(), grad, exp_avg=mean, exp_avg_sq=square, step=update, scale=scale, backend=backend
            )
        return loss.detach()

    return step


@pytest.mark.parametrize("encoder", ["fused", "two-kernel"])
def test_topk_step_in_triton_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, device: str, encoder: str, make_problem: Any
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("SAEKIT_KERNELS_ENCODER", encoder)
    # Indices are checked on the CPU alone.
    monkeypatch.setattr(importlib.import_module("saekit_kernels.decode"), "_check_code", lambda *operands: None)
    problem = make_problem(3, 6, 70).to(torch.float32, device)
    step = make_step(problem, 2, "triton")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
def test_topk_step_as_a_cuda_graph_equals_eager_steps(make_problem: Any) -> None:
    batches = [torch.randn(64, 24, device="cuda") for _ in range(4)]
    eager, graphed = (make_problem(64, 24, 640).to(torch.float32, "cuda") for _ in range(2))
    losses = [make_step_losses(eager, batches)]
    step, static = make_step(graphed, 4, "triton"), batches[0].clone()
    before = [parameter.detach().clone() for parameter in graphed[1:]]
    # Compiles the kernels and times the encoders, in parameters that are put back.
    warm_up = make_step(graphed, 4, "triton")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        warm_up(static)
    torch.cuda.synchronize()
    for parameter, value in zip(graphed[1:], before, strict=True):
        parameter.detach().copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static)
    found = []
    for batch in batches:
        static.copy_(batch)
        graph.replay()
        found.append(float(loss))
    losses.append(found)
    assert losses[0] == losses[1]
    for one, other in zip(eager[1:], graphed[1:], strict=True):
        assert torch.equal(one, other)


def make_step_losses(problem: Any, batches: list[Tensor]) -> list[float]:
    step = make_step(problem, 4, "triton")
    return [float(step(batch)) for batch in batches]
