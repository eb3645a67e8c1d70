"""Top-k by way of 8-bit candidates: the plain path's result for every input, whatever could be proven."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _candidates, _cpu
from saekit_kernels.backend import load_primitives
from torch import Tensor

INF = float("inf")
KINDS = ["int8", "fp8"]


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small dictionaries are scored too."""
    monkeypatch.setattr(_candidates, "CANDIDATES_PER_ENTRY", 3)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose products every path sums exactly."""
    return randn(*shape, seed=seed).mul(3).round()


def with_entry(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    tensor[place] = value
    return tensor


Operands = tuple[Tensor, Tensor, Tensor, int]

# x [N, D], weight [F, D], bias [F], k; which tokens have to go the plain way.
CASES: dict[str, tuple[Callable[[], Operands], str]] = {
    "integers": (lambda: (integers(3, 13), integers(50, 13, seed=1), torch.zeros(50), 4), "any"),
    "one-column": (lambda: (integers(2, 1), integers(40, 1, seed=1), torch.zeros(40), 2), "any"),
    "zeros": (lambda: (torch.zeros(2, 5), integers(40, 5), torch.zeros(40), 2), "all"),
    "all-features-equal": (lambda: (integers(2, 6), torch.ones(40, 6), torch.zeros(40), 3), "all"),
    "duplicated-features": (lambda: (integers(2, 6), integers(4, 6, seed=1).repeat(10, 1), torch.zeros(40), 3), "all"),
    "one-huge-element": (lambda: (with_entry(integers(3, 9), (2, 4), 1e6), integers(40, 9, seed=1), torch.zeros(40), 3), "any"),
    "tokens-too-large": (lambda: (integers(2, 7) * 2.0**60, integers(40, 7, seed=1), torch.zeros(40), 3), "all"),
    "tiny": (lambda: (integers(2, 7) * 2.0**-120, integers(40, 7, seed=1), torch.zeros(40), 3), "any"),
    "nan-token": (lambda: (with_entry(integers(3, 7), (1, 2), math.nan), integers(40, 7, seed=1), torch.zeros(40), 3), "some"),
    "inf-token": (lambda: (with_entry(integers(3, 7), (1, 2), INF), integers(40, 7, seed=1).abs() + 1, torch.zeros(40), 3), "some"),
    "nan-weight": (lambda: (integers(3, 7), with_entry(integers(40, 7, seed=1), (33, 2), math.nan), torch.zeros(40), 3), "any"),
    "inf-bias": (lambda: (integers(3, 7), integers(40, 7, seed=1), with_entry(torch.zeros(40), (7,), INF), 3), "any"),
    "nan-bias": (lambda: (integers(3, 7), integers(40, 7, seed=1), with_entry(torch.zeros(40), (7,), math.nan), 3), "any"),
    "minus-inf-bias": (lambda: (integers(3, 7), integers(40, 7, seed=1), torch.full((40,), -INF), 3), "all"),
    "all-negative": (lambda: (integers(3, 7).abs(), -integers(40, 7, seed=1).abs(), -torch.ones(40), 3), "any"),
    "all-features-kept": (lambda: (integers(3, 7), integers(40, 7, seed=1), torch.zeros(40), 40), "none"),
}  # fmt: skip


# fp8 differs in its codes alone, and Triton by how it makes bounds, which takes a second a case.
FP8_CASES = ["integers", "all-features-equal", "nan-token", "nan-weight"]
TRITON_CASES = ["duplicated-features", "inf-token", "nan-weight"]
ALL_CASES = [(name, case, "int8") for name in ("reference", "cpu", "compiled") for case in CASES]
ALL_CASES += [("triton", case, "int8") for case in TRITON_CASES]
ALL_CASES += [(name, case, "fp8") for name in ("reference", "cpu", "compiled") for case in FP8_CASES]
ALL_CASES += [("triton", "nan-token", "fp8")]


@pytest.mark.parametrize("backend,case,kind", ALL_CASES, ids=str, indirect=["backend"])
# Interpreted, a masked zero times an infinite element warns.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_result_is_the_plain_path_s(backend: Any, device: str, kind: Any, case: str) -> None:
    make, unproven = CASES[case]
    x, weight, bias, k = make()
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    expected = sk.encode_topk(x, weight.T, bias, k, backend="reference")
    found = sk.encode_topk(x, weight.T, bias, k, candidates=kind, backend=backend)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values.nan_to_num(-1), expected.values.nan_to_num(-1))
    if unproven in ("all", "some"):
        *_, is_proven = _candidates.proven_topk(load_primitives(backend), x, weight, bias, k, kind)
        assert not is_proven.all()
        assert is_proven.any() == (unproven == "some") or kind == "fp8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_proven_entries_are_the_largest_in_float64(
    backend: Any, device: str, dtype: torch.dtype, make_problem: Any, assert_close: Any
) -> None:
    truth = make_problem(2, 24, 130, dtype=dtype)
    mine = truth.to(dtype, device)
    weight = mine.W_enc_rows.detach()
    values, indices, is_proven = _candidates.proven_topk(
        load_primitives(backend), mine.x.detach(), weight, mine.b_enc.detach(), 5, "int8"
    )
    assert is_proven.all()
    z = truth.x @ truth.W_enc_rows.T + truth.b_enc
    assert_close(values, z.topk(5).values.relu(), 3e-6)
    assert_close(z.gather(1, indices.cpu()).relu(), values, 3e-6)


def check_bound(backend: Any, device: str, kind: Any, *, num_tokens: int, scale: float) -> None:
    """No entry outside the candidates exceeds the bound."""
    x, bias = randn(num_tokens, 33) * scale, randn(90, seed=3) * scale
    weight = randn(90, 33, seed=1) * randn(90, 1, seed=2).exp()
    x[2, 7] = 60 * scale
    columns, bound = load_primitives(backend).candidates(x.to(device), weight.to(device), bias.to(device), 20, kind)
    z = x.double() @ weight.double().T + bias.double()
    outside = z.scatter(1, columns.cpu(), -INF).amax(1)
    assert (columns.diff(dim=1) > 0).all()
    assert bound.isfinite().all()
    assert (outside <= bound.cpu().double()).all()


@pytest.mark.parametrize("kind,scale", [("int8", 1.0), ("fp8", 1.0), ("int8", 1e-30)], ids=["int8", "fp8", "int8-tiny"])
def test_no_entry_outside_the_candidates_exceeds_the_bound(backend: Any, device: str, kind: Any, scale: float) -> None:
    check_bound(backend, device, kind, num_tokens=3, scale=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_check_of_the_bound_turns_red_where_it_is_too_low(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    check_bound("cpu", "cpu", kind, num_tokens=1000, scale=1.0)
    original = _cpu.quantize
    monkeypatch.setattr(_cpu, "quantize", lambda rows, kind: original(rows, kind)._replace(rest=torch.zeros(len(rows))))
    with pytest.raises(AssertionError):
        check_bound("cpu", "cpu", kind, num_tokens=1000, scale=1.0)


def test_gradients_are_the_plain_path_s(fast_backend: Any, device: str, make_problem: Any, assert_close: Any) -> None:
    gradients = []
    for candidates in (None, "int8"):
        mine = make_problem(3, 17, 43).to(torch.float32, device)
        code = sk.encode_topk(
            mine.x,
            mine.W_enc_rows.T,
            mine.b_enc,
            5,
            candidates=candidates,
            backend=fast_backend,  # type: ignore[arg-type]
        )
        code.values.square().sum().backward()
        gradients.append([mine.x.grad, mine.W_enc_rows.grad, mine.b_enc.grad])
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, 3e-6)


def test_integer_products_give_the_same_bounds(monkeypatch: pytest.MonkeyPatch, assert_close: Any) -> None:
    x, weight, bias = randn(9, 33), randn(150, 33, seed=1), randn(150, seed=2)
    bounds = []
    for has_instructions in (False, True):
        monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda found=has_instructions: found)
        bounds.append(_cpu.candidates(x, weight, bias, 20, "int8"))
    assert torch.equal(bounds[0][0], bounds[1][0])
    assert_close(bounds[0][1], bounds[1][1], 1e-6)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="candidates is 'int4', needs None or one of int8, fp8"):
        sk.encode_topk(torch.zeros(2, 3), torch.zeros(3, 90), torch.zeros(90), 2, candidates="int4")  # type: ignore[arg-type]
