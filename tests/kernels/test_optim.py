"""The optimizer pass: each backend against torch.optim.Adam with projection, clipping and renormalisation around it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _cpu_optim, reference
from torch import Tensor, nn

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(1, 1), (1, 37), (7, 1), (9, 17), (3, 64), (5, 130), (130, 33)]


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_steps(
    weight: Tensor, grads: list[Tensor], scale: float, *, is_unit_norm: bool
) -> tuple[Tensor, list[Tensor]]:
    """Weight and moments after torch's own Adam in float64, each part of the pass an operator of its own."""
    parameter = nn.Parameter(weight.double().clone())
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for grad in grads:
        grad = grad.double()
        if is_unit_norm:
            along = (grad * parameter.detach()).sum(1, keepdim=True)
            grad = grad - along * parameter.detach()
        parameter.grad = grad * scale
        adam.step()
        if is_unit_norm:
            parameter.data /= parameter.data.norm(dim=1, keepdim=True)
    state = adam.state[parameter]
    return parameter.detach(), [state["exp_avg"], state["exp_avg_sq"]]


def our_steps(
    weight: Tensor, grads: list[Tensor], scale: float, backend: str, *, is_unit_norm: bool, shadow: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    weight, moments = weight.clone(), [torch.zeros_like(weight) for _ in range(2)]
    for number, grad in enumerate(grads, start=1):
        step = sk.AdamStep(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, number=number, is_unit_norm=is_unit_norm)
        sk.adam_step(
            weight,
            grad,
            exp_avg=moments[0],
            exp_avg_sq=moments[1],
            step=step,
            scale=scale,
            shadow=shadow,
            backend=backend,  # type: ignore[arg-type]
        )
    return weight, moments


@pytest.mark.parametrize("is_unit_norm", [False, True], ids=["free", "unit rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_equal_those_of_separate_operators(
    backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int], is_unit_norm: bool, assert_close: Any
) -> None:
    weight = drawn(shape, 0)
    if is_unit_norm:
        weight = nn.functional.normalize(weight, dim=1)
    weight = weight.to(dtype)
    grads = [drawn(shape, seed).to(dtype) for seed in (1, 2, 3)]
    if dtype == torch.bfloat16:
        # Rounded after each step, which no other path does: one step, so that only its own rounding differs.
        grads = grads[:1]
    expected, true_moments = plain_steps(weight, grads, 0.7, is_unit_norm=is_unit_norm)
    found, moments = our_steps(
        weight.to(device), [grad.to(device) for grad in grads], 0.7, backend, is_unit_norm=is_unit_norm
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    if shape[1] == 1 and is_unit_norm:
        # The projection leaves nothing of the gradient but rounding, and Adam makes steps of it.
        assert torch.equal(found.abs().cpu(), torch.ones_like(weight))
        return
    assert_close(found, expected, tolerance)
    for one, other in zip(moments, true_moments, strict=True):
        assert_close(one, other, tolerance)


@pytest.mark.parametrize("shape", [(), (1,), (4097,), (3, 4, 5)], ids=str)
def test_arrays_of_any_shape_are_moved(backend: str, device: str, shape: tuple[int, ...], assert_close: Any) -> None:
    weight, grads = drawn(shape, 0).float(), [drawn(shape, 1).float()]
    expected, _ = plain_steps(weight, grads, 1.0, is_unit_norm=False)
    found, _ = our_steps(weight.to(device), [grads[0].to(device)], 1.0, backend, is_unit_norm=False)
    assert_close(found, expected, 1e-6)
    square = sk.gradient_square(grads[0].to(device), backend=backend)  # type: ignore[arg-type]
    assert float(square) == pytest.approx(float(grads[0].double().square().sum()), rel=1e-6)


def test_no_rows_are_no_work(backend: str, device: str) -> None:
    weight = torch.zeros(0, 5, device=device)
    our_steps(weight, [weight], 1.0, backend, is_unit_norm=True)
    assert float(sk.gradient_square(weight, weight, backend=backend)) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shadow_is_the_new_weight_rounded(backend: str, device: str, dtype: torch.dtype) -> None:
    weight, grad = drawn((9, 17), 0).float().to(device), drawn((9, 17), 1).float().to(device)
    shadow = torch.empty(9, 17, dtype=dtype, device=device)
    found, _ = our_steps(weight, [grad], 1.0, backend, is_unit_norm=False, shadow=shadow)
    rounded = found.to(dtype)
    # Interpreted Triton truncates where others round.
    allowed = 1 if backend == "triton" else 0
    assert (shadow.view(torch.int16).int() - rounded.view(torch.int16).int()).abs().max() <= allowed


def test_shadow_rounds_ties_to_even_and_keeps_nan(compiled_backend: str) -> None:
    weight = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, math.nan, math.inf, -0.0, 3e38])
    shadow = torch.empty(6, dtype=torch.bfloat16)
    zeros = torch.zeros(6)
    step = sk.AdamStep(lr=0.0, number=1)
    sk.adam_step(
        weight,
        zeros,
        exp_avg=zeros.clone(),
        exp_avg_sq=zeros.clone(),
        step=step,
        shadow=shadow,
        backend=compiled_backend,  # type: ignore[arg-type]
    )
    assert torch.equal(shadow.nan_to_num(7.0), weight.bfloat16().nan_to_num(7.0))
    assert shadow[2].isnan()


@pytest.mark.parametrize("is_unit_norm", [False, True], ids=["free", "unit rows"])
@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (130, 33), (4, 4100)], ids=str)
def test_gradient_square_is_that_of_the_projected_gradient(
    backend: str, device: str, shape: tuple[int, int], is_unit_norm: bool
) -> None:
    weight, grad = nn.functional.normalize(drawn(shape, 0), dim=1), drawn(shape, 1)
    rest = grad - (grad * weight).sum(1, keepdim=True) * weight if is_unit_norm else grad
    rows = weight.float().to(device) if is_unit_norm else None
    found = sk.gradient_square(grad.float().to(device), rows, backend=backend)  # type: ignore[arg-type]
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(rest.square().sum()), rel=1e-5, abs=1e-9)


def test_gradient_along_the_rows_has_no_norm_left(backend: str, device: str) -> None:
    """The difference of two large squares would leave rounding where the projected gradient is small."""
    weight = nn.functional.normalize(drawn((40, 64), 0), dim=1).float().to(device)
    across = drawn((40, 64), 1).float().to(device) * 1e-5
    across -= (across * weight).sum(1, keepdim=True) * weight
    found = sk.gradient_square(1.0 * weight + across, weight, backend=backend)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(float(across.double().square().sum()), rel=0.05)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, on which Triton is interpreted
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_shows_in_the_norm(backend: str, device: str, bad: float) -> None:
    weight = nn.functional.normalize(torch.ones(3, 40, device=device), dim=1)
    grad = torch.ones(3, 40, device=device)
    grad[1, 33] = bad
    for rows in (None, weight):
        assert not math.isfinite(float(sk.gradient_square(grad, rows, backend=backend)))  # type: ignore[arg-type]


def test_scale_may_be_a_tensor_and_the_gradient_of_any_layout(backend: str, device: str) -> None:
    weight = nn.functional.normalize(drawn((9, 17), 0), dim=1).float().to(device)
    grad = drawn((17, 9), 1).float().to(device).T
    before = grad.clone()
    expected, _ = our_steps(weight, [grad.contiguous()], 0.5, backend, is_unit_norm=True)
    found, _ = our_steps(weight, [grad], torch.tensor(0.5, device=device), backend, is_unit_norm=True)  # type: ignore[arg-type]
    # The reference sums in the order of the memory.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(grad, before)


def test_steps_are_bit_equal_twice(fast_backend: str, device: str, two_threads: None) -> None:
    # Several blocks of each; one program at a time is interpreted.
    rows = 40 if fast_backend == "triton" and device == "cpu" else 300
    weight = nn.functional.normalize(drawn((rows, 70), 0), dim=1).float().to(device)
    grads = [drawn((rows, 70), seed).float().to(device) for seed in (1, 2)]
    first, second = (our_steps(weight, grads, 0.3, fast_backend, is_unit_norm=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    squares = {float(sk.gradient_square(grads[0], weight, backend=fast_backend)) for _ in range(2)}  # type: ignore[arg-type]
    assert len(squares) == 1


def test_blocks_do_not_change_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.functional.normalize(drawn((30, 7), 0), dim=1)
    whole, _ = our_steps(weight, [drawn((30, 7), 1)], 0.3, "cpu", is_unit_norm=True)
    monkeypatch.setattr(_cpu_optim, "BLOCK_ELEMENTS", 20)
    cut, _ = our_steps(weight, [drawn((30, 7), 1)], 0.3, "cpu", is_unit_norm=True)
    torch.testing.assert_close(cut, whole, rtol=1e-14, atol=0)


def rows_keep_unit_norm() -> None:
    weight = nn.functional.normalize(drawn((9, 17), 0), dim=1)
    found, _ = our_steps(weight, [drawn((9, 17), 1)], 1.0, "cpu", is_unit_norm=True)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(9, dtype=torch.float64))


def moments_see_no_part_along_the_rows() -> None:
    weight = nn.functional.normalize(drawn((9, 17), 0), dim=1)
    _, (mean, _) = our_steps(weight, [drawn((9, 17), 1)], 1.0, "cpu", is_unit_norm=True)
    assert (mean * weight).sum(1).abs().max() < 1e-12


MUTANTS: list[tuple[str, Callable[..., Any], Callable[[], None]]] = [
    ("without_part_along", lambda grad, weight: grad, moments_see_no_part_along_the_rows),
    ("without_part_along", lambda grad, weight: grad - weight * grad.sum(), moments_see_no_part_along_the_rows),
]


def test_checks_pass_on_our_code() -> None:
    rows_keep_unit_norm()
    moments_see_no_part_along_the_rows()


@pytest.mark.parametrize("name,mutant,check", MUTANTS)
def test_checks_catch_a_missing_projection(
    monkeypatch: pytest.MonkeyPatch, name: str, mutant: Callable[..., Any], check: Callable[[], None]
) -> None:
    monkeypatch.setattr(reference, name, mutant)
    with pytest.raises(AssertionError):
        check()


def test_operands_that_do_not_fit_are_refused() -> None:
    weight, step = torch.zeros(3, 4), sk.AdamStep(lr=0.1, number=1, is_unit_norm=True)
    moments = {"exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"adam_step: \[3, 4\] on cpu and \[4, 3\] on cpu, needs one shape and device"):
        sk.adam_step(weight, torch.zeros(4, 3), step=step, **moments)
    with pytest.raises(ValueError, match=r"adam_step: weight has strides \[1, 3\], needs contiguous memory"):
        sk.adam_step(torch.zeros(4, 3).T, weight, step=step, **moments)
    with pytest.raises(ValueError, match=r"weight is \[4\], needs \[R, D\] for rows of unit norm"):
        flat = torch.zeros(4)
        sk.adam_step(flat, flat, exp_avg=flat.clone(), exp_avg_sq=flat.clone(), step=step)
    with pytest.raises(ValueError, match=r"dtypes .*torch.int64.* needs floating point"):
        sk.gradient_square(torch.zeros(3, 4, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r"gradient_square: weight is \[4\], needs \[R, D\]"):
        sk.gradient_square(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"step.number is 0, needs 1 for the first step"):
        sk.AdamStep(lr=0.1, number=0)
