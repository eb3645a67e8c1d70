"""Selection over a whole batch: exact, with the stated rule for ties, whatever the sample says of the bound."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _batch
from torch import Tensor

INF = float("inf")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def kept_of(z: Tensor, k: int) -> list[int]:
    """Flat places of the N * k largest positive or NaN entries, NaN first, lowest place among equals: plain Python."""
    flat = z.flatten().tolist()
    nans = [place for place, value in enumerate(flat) if math.isnan(value)]
    numbers = [place for place, value in enumerate(flat) if value > 0]
    numbers.sort(key=lambda place: (-flat[place], place))
    return sorted([*nans, *numbers][: len(z) * k])


def encode_exactly(z: Tensor, k: int, backend: str, device: str, bias: Tensor | None = None) -> sk.BatchTopKCode:
    """encode_batch_topk with pre-activations that are exactly z + bias: the tokens are unit vectors."""
    bias = torch.zeros(z.shape[1]) if bias is None else bias
    x = torch.eye(len(z), device=device)
    return sk.encode_batch_topk(x, z.to(device), bias.to(device), k, backend=backend)  # type: ignore[arg-type]


def places_of(code: sk.BatchTopKCode, num_features: int) -> list[int]:
    rows = torch.repeat_interleave(torch.arange(len(code.offsets) - 1), code.offsets.cpu().diff())
    return (rows * num_features + code.indices.cpu()).tolist()


CASES: dict[str, tuple[Callable[[], Tensor], int]] = {
    "random": (lambda: randn(6, 70), 5),
    "one-token": (lambda: randn(1, 70), 3),
    "one-feature": (lambda: randn(5, 1), 1),
    "one-token-takes-nearly-all": (lambda: torch.cat([randn(1, 70) + 60, randn(5, 70)]), 5),
    "k-is-one": (lambda: randn(6, 70), 1),
    "all-features": (lambda: randn(4, 37), 37),
    "all-equal": (lambda: torch.ones(4, 70), 3),
    "integer-ties": (lambda: randn(6, 70).mul(2).round(), 7),
    "fewer-positive-than-wanted": (lambda: randn(6, 70) - 2.0, 9),
    "none-positive": (lambda: -randn(6, 70).abs(), 3),
    "signed-zeros": (lambda: torch.where(randn(3, 70) < 0, 0.0, -0.0), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_batch_keeps_its_largest_entries_and_the_first_of_equals(backend: str, device: str, case: str) -> None:
    make, k = CASES[case]
    z = make()
    code = encode_exactly(z, k, backend, device)
    expected = kept_of(z, k)
    assert places_of(code, z.shape[1]) == expected
    assert torch.equal(code.values.cpu(), z.flatten()[expected])
    assert int(code.offsets[-1]) == len(expected) <= len(z) * k


@pytest.mark.parametrize(
    "entries",
    [{7: INF, 9: -INF}, {11: math.nan}, {11: math.nan, 30: INF}, dict.fromkeys(range(30), math.nan)],
    ids=["inf", "nan", "nan-above-inf", "more-nan-than-wanted"],
)
def test_nan_ranks_first_and_nothing_is_hidden(backend: str, device: str, entries: dict[int, float]) -> None:
    bias = torch.zeros(48)
    for column, value in entries.items():
        bias[column] = value
    z = randn(3, 48)
    code = encode_exactly(z, 4, backend, device, bias=bias)
    assert places_of(code, 48) == kept_of(z + bias, 4)


@pytest.mark.parametrize("misleading", ["quiet", "loud"])
def test_sample_that_misleads_changes_nothing(
    fast_backend: str, device: str, misleading: str, monkeypatch: Any
) -> None:
    """The bound comes from other tokens than those that hold the entries, in either direction."""
    monkeypatch.setattr(_batch, "SAMPLE_TOKENS", 1)
    z = randn(6, 70)
    z[0] *= 0.01 if misleading == "quiet" else 50.0
    code = encode_exactly(z, 5, fast_backend, device)
    assert places_of(code, 70) == kept_of(z, 5)


def test_usual_batch_needs_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit_kernels import _cpu

    calls: list[int] = []
    threshold = _cpu.threshold
    monkeypatch.setattr(_cpu, "threshold", lambda *operands: calls.append(1) or threshold(*operands))
    x, W, b = randn(500, 16), randn(300, 16), torch.zeros(300)
    code = sk.encode_batch_topk(x, W.T, b, 8, backend="cpu")
    assert len(code.values) == 500 * 8
    assert len(calls) == 1


def dense_code(problem: Any, k: int) -> Tensor:
    z = problem.x @ problem.W_enc_rows.T + problem.b_enc
    is_kept = torch.zeros(z.numel(), dtype=torch.bool)
    is_kept[torch.sort(z.detach().flatten(), descending=True, stable=True).indices[: len(z) * k]] = True
    return torch.where(is_kept.view(z.shape), z.relu(), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_equal_dense_autograd(
    backend: str, device: str, dtype: torch.dtype, make_problem: Any, assert_close: Any, tolerances: Any
) -> None:
    drawn = make_problem(9, 17, 43, dtype=dtype)
    truth, mine = drawn.to(torch.float64), drawn.to(dtype, device)
    expected = dense_code(truth, 5) @ truth.W_dec + truth.b_dec
    code = sk.encode_batch_topk(mine.x, mine.W_enc_rows.T, mine.b_enc, 5, backend=backend)  # type: ignore[arg-type]
    found = sk.decode(
        code.values,
        code.indices,
        mine.W_dec,
        mine.b_dec,
        offsets=code.offsets,
        backend=backend,  # type: ignore[arg-type]
    )
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected.backward(upstream)
    found.backward(upstream.to(found))
    assert_close(found, expected, tolerances[dtype].output)
    for mine_grad, true_grad in zip(mine.gradients(), truth.gradients(), strict=True):
        assert_close(mine_grad, true_grad, tolerances[dtype].gradient)


def test_gradients_pass_finite_differences(make_problem: Any) -> None:
    problem = make_problem(3, 4, 12, seed=2).to(torch.float64)

    def values(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return sk.encode_batch_topk(x, W.T, b, 3, backend="cpu").values

    assert torch.autograd.gradcheck(values, (problem.x, problem.W_enc_rows, problem.b_enc))


def test_codes_are_bit_equal_twice(fast_backend: str, device: str, two_threads: None) -> None:
    # Several blocks of each; one program at a time is interpreted.
    num_tokens = 10 if fast_backend == "triton" and device == "cpu" else 40
    x, W, b = randn(num_tokens, 16).to(device), randn(200, 16).to(device), torch.zeros(200, device=device)
    first, second = (sk.encode_batch_topk(x, W.T, b, 4, backend=fast_backend) for _ in range(2))  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_no_tokens_have_no_entries(backend: str, device: str) -> None:
    x, W = torch.zeros(0, 4, device=device), torch.zeros(4, 70, device=device)
    code = sk.encode_batch_topk(x, W, torch.zeros(70, device=device), 3, backend=backend)  # type: ignore[arg-type]
    assert code.values.shape == code.indices.shape == (0,)
    assert code.offsets.tolist() == [0]


@pytest.mark.parametrize("k", [0, 9])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"encode_batch_topk: k is {k}, needs 1 to d_sae = 8"):
        sk.encode_batch_topk(torch.zeros(4, 3), torch.zeros(3, 8), torch.zeros(8), k)


def ties_go_to_the_first_token() -> None:
    code = sk.encode_batch_topk(torch.ones(3, 1), torch.zeros(1, 8), torch.ones(8), 2, backend="cpu")
    assert code.offsets.tolist() == [0, 6, 6, 6]


def test_first_token_gets_the_ties() -> None:
    ties_go_to_the_first_token()


def test_check_catches_ties_that_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at or above the smallest kept value: more than N * k entries where it is tied."""

    def at_least(
        pre_acts: Tensor, indices: Tensor, offsets: Tensor, *, num_wanted: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = pre_acts >= torch.topk(pre_acts, min(num_wanted, len(pre_acts))).values.min()
        return pre_acts[kept], indices[kept], torch.cat([offsets.new_zeros(1), kept.cumsum(0)])[offsets]

    monkeypatch.setattr(_batch, "_largest", at_least)
    with pytest.raises(AssertionError):
        ties_go_to_the_first_token()
