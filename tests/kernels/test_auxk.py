"""AuxK over compacted features: forward and every gradient against dense autograd in float64."""

from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _dense
from torch import Tensor


def dense_auxk(problem: Any, k: int) -> Tensor:
    z = problem.x @ problem.W_enc_rows.T + problem.b_enc
    selected = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(z).scatter(1, selected, z.gather(1, selected).relu()) @ problem.W_dec


# Features and how many a token uses: gathers, dense blocks, all of them, none there.
SIZES = {"sparse": (30, 3), "dense-blocks": (20, 9), "all-kept": (7, 7), "fewer-than-k": (5, 9), "one": (1, 1)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SIZES)
def test_auxk_equals_dense_autograd(
    backend: Any,
    device: str,
    case: str,
    dtype: torch.dtype,
    make_problem: Any,
    assert_close: Any,
    tolerances: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_dense, "BLOCK_ROWS", 4)
    num_features, k = SIZES[case]
    drawn = make_problem(5, 9, num_features, dtype=dtype)
    truth, mine = drawn.to(torch.float64), drawn.to(dtype, device)
    expected = dense_auxk(truth, k)
    found = sk.auxk(mine.x, mine.W_enc_rows.T, mine.b_enc, mine.W_dec, k, backend=backend)
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    expected.backward(upstream)
    found.backward(upstream.to(found))
    assert_close(found, expected, tolerances[dtype].output)
    for mine_grad, true_grad in zip(mine.gradients()[:4], truth.gradients()[:4], strict=True):
        assert_close(mine_grad, true_grad, tolerances[dtype].gradient)


def test_auxk_of_no_features_is_zero(backend: Any, device: str, make_problem: Any) -> None:
    nothing = make_problem(4, 5, 0).to(torch.float32, device)
    found = sk.auxk(nothing.x, nothing.W_enc_rows.T, nothing.b_enc, nothing.W_dec, 3, backend=backend)
    found.sum().backward()
    assert torch.equal(found, torch.zeros(4, 5, device=device))
    assert nothing.x.grad is not None
    assert not nothing.x.grad.any()


@pytest.mark.parametrize("is_dense", [False, True], ids=["gathers", "dense-blocks"])
def test_triton_takes_dense_blocks_of_dense_codes(
    device: str, is_dense: bool, make_problem: Any, assert_close: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from saekit_kernels import _decode_triton

    monkeypatch.setattr(_decode_triton, "MIN_DENSITY", 0.01 if is_dense else 2.0)
    calls: list[str] = []
    for name in ("gather_sum", "gather_dot", "scatter_sum"):
        right = getattr(_dense, name)
        monkeypatch.setattr(_dense, name, lambda *args, n=name, f=right: calls.append(n) or f(*args))
    drawn = make_problem(5, 6, 30)
    truth, mine = drawn.to(torch.float64), drawn.to(torch.float32, device)
    expected = dense_auxk(truth, 4)
    found = sk.auxk(mine.x, mine.W_enc_rows.T, mine.b_enc, mine.W_dec, 4, backend="triton")
    expected.square().sum().backward()
    found.square().sum().backward()
    for mine_grad, true_grad in zip(mine.gradients()[:4], truth.gradients()[:4], strict=True):
        assert_close(mine_grad, true_grad, 3e-6)
    assert len(calls) == (5 if is_dense else 0)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": 0}, "k is 0, needs at least 1"),
        ({"W_dec": torch.zeros(3, 5)}, r"W_dec is \[3, 5\], needs \[n, D_out\] with n = 2"),
        ({"b_enc": torch.zeros(3), "k": 9}, "auxk: x .* with equal D and F"),
    ],
    ids=["k-zero", "W_dec", "b_enc"],
)
def test_auxk_refuses_operands_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    operands: dict[str, Any] = {
        "x": torch.zeros(4, 5),
        "W_enc": torch.zeros(5, 2),
        "b_enc": torch.zeros(2),
        "W_dec": torch.zeros(2, 5),
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        sk.auxk(**(operands | change))
