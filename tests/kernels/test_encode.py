"""Selection: exact, in the stated order, with the stated rule for ties and non-finite values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from bench.shapes import TEST_SHAPES, Shape
from torch import Tensor

INF = float("inf")


def ranked(z: Tensor, k: int) -> list[list[int]]:
    """Columns of the k largest per row, NaN first, then by value, then by index: plain Python, no torch."""
    rank = lambda value: -INF if math.isnan(value) else -value  # noqa: E731
    rows = z.tolist()
    return [sorted(range(len(row)), key=lambda j: (not math.isnan(row[j]), rank(row[j]), j))[:k] for row in rows]


def encode_exactly(z: Tensor, k: int, backend: str, device: str, bias: Tensor | None = None) -> sk.TopKCode:
    """encode_topk with pre-activations that are exactly z + bias: the tokens are unit vectors."""
    x = torch.eye(len(z), device=device)
    b_enc = torch.zeros(z.shape[1]) if bias is None else bias
    return sk.encode_topk(x, z.to(device), b_enc.to(device), k, backend=backend)  # type: ignore[arg-type]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


ADVERSARIAL: dict[str, tuple[Callable[[], Tensor], int]] = {
    "random": (lambda: randn(4, 160), 8),
    "zeros": (lambda: torch.zeros(3, 160), 8),
    "signed-zeros": (lambda: torch.where(randn(3, 160) < 0, 0.0, -0.0), 8),
    "integer-ties": (lambda: randn(4, 160).round(), 8),
    "tie-at-the-edge": (lambda: torch.tensor([[3.0, 1, 2, 1, 1] + [0.0] * 155]), 3),
    "duplicated-features": (lambda: randn(3, 16).repeat(1, 10), 8),
    "all-negative": (lambda: -randn(3, 160).abs() - 1, 8),
    "denormals": (lambda: randn(3, 160) * 1e-41, 8),
    "rising": (lambda: torch.arange(160.0).repeat(2, 1), 8),
    "falling": (lambda: -torch.arange(160.0).repeat(2, 1), 8),
    "winners-in-one-group": (lambda: torch.cat([randn(3, 32), randn(3, 16) + 50, randn(3, 112)], 1), 12),
    "winners-in-a-prefix": (lambda: randn(3, 160) + 5 * (torch.arange(160) < 20), 12),
    "winners-in-the-last-columns": (lambda: randn(3, 163) + 50 * (torch.arange(163) >= 160), 3),
    "fewer-groups-than-k": (lambda: randn(3, 40).round(), 24),
    "fewer-positive-than-k": (lambda: randn(3, 160) - 2.5, 24),
    "huge": (lambda: randn(3, 160) * 1e38, 8),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_encode_topk_takes_the_largest_and_the_lowest_index_of_equals(backend: str, device: str, case: str) -> None:
    make, k = ADVERSARIAL[case]
    z = make()
    code = encode_exactly(z, k, backend, device)
    expected = torch.tensor(ranked(z, k))
    assert code.indices.dtype == torch.int64
    assert torch.equal(code.indices.cpu(), expected)
    assert torch.equal(code.values.cpu(), z.gather(1, expected).clamp(min=0))


@pytest.mark.parametrize(
    "num_columns,k",
    [(4608, 8), (4611, 8), (1029, 7), (260, 1)],
    ids=["two-levels", "remainder", "one-level", "k-is-one"],
)
@pytest.mark.parametrize("is_tied", [False, True], ids=["distinct", "tied"])
def test_encode_topk_is_exact_over_wide_rows(num_columns: int, k: int, is_tied: bool) -> None:
    z = randn(6, num_columns)
    z = z.mul(4).round() if is_tied else z
    code = encode_exactly(z, k, "cpu", "cpu")
    assert code.indices.tolist() == ranked(z, k)


NON_FINITE: dict[str, tuple[dict[int, float], int]] = {
    "inf": ({7: INF}, 4),
    "minus-inf": ({7: -INF}, 4),
    "all-kept-with-minus-inf": ({7: -INF, 2: INF}, 48),
    "nan": ({11: math.nan}, 4),
    "nan-of-either-sign": ({11: math.nan, 30: -math.nan}, 4),
    "nan-above-inf": ({3: INF, 11: math.nan, 40: math.nan}, 4),
    "mostly-nan": (dict.fromkeys(range(40), math.nan), 44),
    "all-nan": (dict.fromkeys(range(48), math.nan), 4),
}


@pytest.mark.parametrize("case", NON_FINITE)
def test_encode_topk_ranks_nan_first_and_hides_nothing(backend: str, device: str, case: str) -> None:
    entries, k = NON_FINITE[case]
    bias = torch.zeros(48)
    for column, value in entries.items():
        bias[column] = value
    z = randn(3, 48)
    code = encode_exactly(z, k, backend, device, bias=bias)
    expected = torch.tensor(ranked(z + bias, k))
    assert torch.equal(code.indices.cpu(), expected)
    assert torch.equal(code.values.cpu().nan_to_num(-1), (z + bias).gather(1, expected).relu().nan_to_num(-1))


def test_encode_topk_lets_a_nan_token_reach_its_own_row_only(backend: str, device: str) -> None:
    x = randn(3, 6)
    x[1, 2] = math.nan
    code = sk.encode_topk(x.to(device), randn(6, 50).to(device), torch.zeros(50, device=device), 4, backend=backend)
    assert code.values.isnan().all(1).tolist() == [False, True, False]
    assert code.indices[1].tolist() == [0, 1, 2, 3]


def test_encode_topk_works_chunk_by_chunk(fast_backend: str, device: str, small_chunks: None) -> None:
    z = randn(11, 70)
    assert encode_exactly(z, 5, fast_backend, device).indices.tolist() == ranked(z, 5)


def test_encode_topk_sorts_rows_that_one_program_cannot_hold(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from saekit_kernels import _encode_triton

    monkeypatch.setattr(_encode_triton, "MAX_SELECTED_FROM", 8)
    z = randn(5, 70).mul(3).round()
    assert encode_exactly(z, 9, "triton", device).indices.tolist() == ranked(z, 9)


@pytest.mark.parametrize(
    "shape,dtype",
    [(TEST_SHAPES[0], torch.bfloat16), (TEST_SHAPES[0], torch.float16)]
    + [(shape, torch.float32) for shape in TEST_SHAPES],
    ids=lambda value: value.name if isinstance(value, Shape) else str(value),
)
def test_encode_topk_equals_dense_float64(
    backend: str, device: str, shape: Shape, dtype: torch.dtype, make_problem: Any, assert_close: Any, tolerances: Any
) -> None:
    truth = make_problem(shape.num_tokens, shape.d_in, shape.d_sae, dtype=dtype)
    mine = truth.to(dtype, device)
    code = sk.encode_topk(mine.x, mine.W_enc_rows.T, mine.b_enc, shape.k, backend=backend)
    z = truth.x @ truth.W_enc_rows.T + truth.b_enc
    assert code.values.dtype == torch.float32
    assert_close(code.values, z.topk(shape.k).values.relu(), tolerances[dtype].output)
    # Indices through the values they point at: two pre-activations may be closer than float32 tells apart.
    assert_close(z.gather(1, code.indices.cpu()).relu(), code.values, tolerances[dtype].output)


@pytest.mark.parametrize(
    "bandwidth,dtype",
    [(0.0, torch.float32), (0.4, torch.float32), (0.4, torch.bfloat16), (0.4, torch.float16)],
    ids=["active", "active-and-near", "active-and-near-bfloat16", "active-and-near-float16"],
)
def test_encode_threshold_lists_active_and_near_entries(
    backend: str, device: str, bandwidth: float, dtype: torch.dtype, make_problem: Any, assert_close: Any
) -> None:
    truth = make_problem(9, 17, 75, dtype=dtype, seed=1)
    mine = truth.to(dtype, device)
    threshold = torch.rand(75, generator=torch.Generator().manual_seed(0), dtype=torch.float32) + 0.3
    code = sk.encode_threshold(
        mine.x, mine.W_enc_rows.T, mine.b_enc, threshold.to(device), bandwidth=bandwidth, backend=backend
    )
    z = truth.x @ truth.W_enc_rows.T + truth.b_enc
    expected = (z > threshold) | ((z - threshold).abs() < bandwidth / 2)
    rows, columns = expected.nonzero(as_tuple=True)
    assert torch.equal(code.indices.cpu(), columns)
    assert code.offsets.tolist() == [0, *expected.sum(1).cumsum(0).tolist()]
    assert_close(code.pre_acts, z[rows, columns], 3e-6)


THRESHOLDS = {
    "none-kept": (9.0, 0),
    "all-kept": (-9.0, 3 * 70),
    "equal-is-not-active": (0.0, 0),
}


@pytest.mark.parametrize("case", THRESHOLDS)
def test_encode_threshold_at_the_extremes(backend: str, device: str, case: str) -> None:
    threshold, num_entries = THRESHOLDS[case]
    code = sk.encode_threshold(
        torch.eye(3, device=device),
        torch.zeros(3, 70, device=device),
        torch.zeros(70, device=device),
        torch.full((70,), threshold, device=device),
        backend=backend,
    )
    assert code.indices.tolist() == (list(range(70)) * 3)[:num_entries]
    assert code.offsets.tolist() == [n * num_entries // 3 for n in range(4)]


def test_encode_threshold_keeps_nan(backend: str, device: str) -> None:
    bias = torch.zeros(70, device=device)
    bias[33] = math.nan
    z = torch.zeros(2, 70, device=device)
    code = sk.encode_threshold(torch.eye(2, device=device), z, bias, torch.ones(70, device=device), backend=backend)
    assert code.indices.tolist() == [33, 33]
    assert code.pre_acts.isnan().all()


@pytest.mark.parametrize("density", [0.01, 0.3], ids=["sparse", "dense"])
def test_encode_threshold_works_chunk_by_chunk(
    fast_backend: str, device: str, small_chunks: None, density: float
) -> None:
    z = randn(11, 70)
    threshold = z.flatten().sort(descending=True).values[int(density * z.numel())].repeat(70)
    code = sk.encode_threshold(
        torch.eye(11, device=device),
        z.to(device),
        torch.zeros(70, device=device),
        threshold.to(device),
        backend=fast_backend,  # type: ignore[arg-type]
    )
    assert torch.equal(code.pre_acts.cpu(), z[z > threshold])
    assert torch.equal(code.indices.cpu(), (z > threshold).nonzero()[:, 1])
    assert torch.equal(code.offsets[1:].cpu(), (z > threshold).sum(1).cumsum(0))


def test_encoders_take_no_tokens(backend: str, device: str) -> None:
    x, W_enc, b_enc = (
        torch.zeros(0, 4, device=device),
        torch.zeros(4, 70, device=device),
        torch.zeros(70, device=device),
    )
    assert sk.encode_topk(x, W_enc, b_enc, 3, backend=backend).indices.shape == (0, 3)
    code = sk.encode_threshold(x, W_enc, b_enc, b_enc, backend=backend)
    assert code.pre_acts.shape == (0,)
    assert code.offsets.tolist() == [0]


def test_encode_topk_reads_operands_of_any_layout(backend: str, device: str) -> None:
    x, weight = randn(5, 12).to(device), randn(6, 90).to(device)
    expected = sk.encode_topk(x[:, ::2].contiguous(), weight.contiguous(), weight[0], 4, backend="reference")
    found = sk.encode_topk(x[:, ::2], weight.T.contiguous().T, weight[0], 4, backend=backend)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": 0}, "k is 0, needs 1 to d_sae = 8"),
        ({"k": 9}, "k is 9, needs 1 to d_sae = 8"),
        ({"x": torch.zeros(4)}, r"x \[4\], W_enc \[3, 8\]"),
        ({"x": torch.zeros(4, 2)}, "equal D and F"),
        ({"b_enc": torch.zeros(7)}, "equal D and F"),
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, "torch.int64.*needs floating point"),
        ({"x": torch.zeros(4, 3, device="meta")}, "operands on meta, cpu, cpu, needs one device"),
    ],
    ids=["k-zero", "k-too-large", "one-dimension", "wrong-d_in", "wrong-d_sae", "integers", "two-devices"],
)
def test_encode_topk_refuses_operands_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    operands: dict[str, Any] = {"x": torch.zeros(4, 3), "W_enc": torch.zeros(3, 8), "b_enc": torch.zeros(8), "k": 2}
    with pytest.raises(ValueError, match=message):
        sk.encode_topk(**(operands | change))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"threshold": torch.zeros(7)}, r"threshold is torch.float32 \[7\] on cpu, needs floating-point \[8\]"),
        ({"threshold": torch.zeros(8, dtype=torch.int64)}, "torch.int64"),
        ({"bandwidth": -1.0}, "bandwidth is -1.0, needs a finite number, at least 0"),
        ({"bandwidth": math.nan}, "bandwidth is nan"),
    ],
    ids=["shape", "dtype", "negative-bandwidth", "nan-bandwidth"],
)
def test_encode_threshold_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    operands: dict[str, Any] = {
        "x": torch.zeros(4, 3),
        "W_enc": torch.zeros(3, 8),
        "b_enc": torch.zeros(8),
        "threshold": torch.zeros(8),
    }
    with pytest.raises(ValueError, match=message):
        sk.encode_threshold(**(operands | change))
