"""Decode: values against a dense product in float64, from pairs and from CSR, and every input it must refuse."""

from typing import Any

import pytest
import saekit_kernels as sk
import torch
from bench.shapes import TEST_SHAPES, Shape
from torch import Tensor


def random_pairs(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """values and indices [N, K]; every row repeats one index."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape.num_tokens, shape.k, generator=generator, dtype=torch.float64).float()
    indices = torch.randint(shape.d_sae, values.shape, generator=generator)
    indices[:, -1] = indices[:, 0]
    return values, indices


def dense_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """sum over j of values[n, j] * W_dec[indices[n, j]] + b_dec, in float64."""
    return torch.einsum("nk,nkd->nd", values.double(), W_dec.double()[indices]) + b_dec.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TEST_SHAPES, ids=lambda shape: shape.name)
def test_decode_equals_the_dense_sum(
    backend: str, device: str, shape: Shape, dtype: torch.dtype, make_problem: Any, assert_close: Any, tolerances: Any
) -> None:
    truth = make_problem(shape.num_tokens, shape.d_in, shape.d_sae, dtype=dtype)
    mine = truth.to(dtype, device)
    values, indices = random_pairs(shape)
    x_hat = sk.decode(values.to(device), indices.to(device), mine.W_dec, mine.b_dec, backend=backend)  # type: ignore[arg-type]
    assert x_hat.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(x_hat, dense_decode(values, indices, truth.W_dec, truth.b_dec), tolerances[dtype].output)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_decode_of_csr_equals_decode_of_pairs(backend: str, device: str, index_dtype: torch.dtype) -> None:
    shape = TEST_SHAPES[0]
    values, indices = (tensor.to(device) for tensor in random_pairs(shape))
    W_dec = torch.randn(shape.d_sae, shape.d_in).to(device)
    offsets = torch.arange(shape.num_tokens + 1, device=device) * shape.k
    pairs = sk.decode(values, indices, W_dec, backend=backend)  # type: ignore[arg-type]
    flat = indices.flatten().to(index_dtype)
    csr = sk.decode(values.flatten(), flat, W_dec, offsets=offsets, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(pairs, csr)


def test_decode_of_rows_of_any_length(backend: str, device: str, assert_close: Any) -> None:
    offsets = torch.tensor([0, 0, 3, 3, 40, 41, 41], device=device)
    values, indices = torch.randn(41), torch.randint(23, (41,))
    W_dec = torch.randn(23, 10)
    x_hat = sk.decode(values.to(device), indices.to(device), W_dec.to(device), offsets=offsets, backend=backend)  # type: ignore[arg-type]
    expected = torch.zeros(6, 10, dtype=torch.float64)
    for row in range(6):
        for entry in range(int(offsets[row]), int(offsets[row + 1])):
            expected[row] += values[entry].double() * W_dec[indices[entry]].double()
    assert_close(x_hat, expected, 3e-6)


@pytest.mark.parametrize("layout", ["pairs", "csr"])
def test_decode_of_nothing_is_the_bias(backend: str, device: str, layout: str) -> None:
    W_dec, b_dec = torch.randn(7, 4).to(device).requires_grad_(), torch.randn(4).to(device)
    shape = (3, 0) if layout == "pairs" else (0,)
    offsets = None if layout == "pairs" else torch.zeros(4, dtype=torch.int64, device=device)
    values = torch.zeros(shape, device=device, requires_grad=True)
    indices = torch.zeros(shape, dtype=torch.int64, device=device)
    x_hat = sk.decode(values, indices, W_dec, b_dec, offsets=offsets, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(x_hat, b_dec.expand(3, 4))
    x_hat.sum().backward()
    assert W_dec.grad is not None
    assert not W_dec.grad.any()


def test_decode_of_no_tokens(backend: str, device: str) -> None:
    values = torch.zeros(0, 3, device=device)
    x_hat = sk.decode(values, values.long(), torch.randn(7, 4).to(device), backend=backend)  # type: ignore[arg-type]
    assert x_hat.shape == (0, 4)


def test_decode_reads_operands_of_any_layout(backend: str, device: str, assert_close: Any) -> None:
    values, indices = torch.randn(6, 10)[:, ::2].to(device), torch.randint(9, (5, 6)).T.to(device)
    W_dec = torch.randn(4, 9).T.to(device)
    x_hat = sk.decode(values, indices, W_dec, backend=backend)  # type: ignore[arg-type]
    assert_close(x_hat, torch.einsum("nk,nkd->nd", values, W_dec[indices]), 3e-6)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"indices": torch.zeros(4, 3, dtype=torch.int64)}, r"values \[4, 2\], indices \[4, 3\], needs both \[N, K\]"),
        ({"values": torch.zeros(8), "indices": torch.zeros(8, dtype=torch.int64)}, r"needs both \[N, K\]"),
        ({"offsets": torch.tensor([0, 8])}, r"needs both \[nnz\] \(CSR\)"),
        ({"indices": torch.zeros(4, 2)}, "indices torch.float32, needs floating point and int64 or int32"),
        ({"indices": torch.full((4, 2), 5)}, "indices from 5 to 5, needs 0 to 4"),
        ({"indices": torch.full((4, 2), -1)}, "indices from -1 to -1, needs 0 to 4"),
        ({"W_dec": torch.zeros(5)}, r"W_dec is torch.float32 \[5\] on cpu, needs floating-point \[F, D\]"),
        ({"W_dec": torch.zeros(5, 3, device="meta")}, r"W_dec is torch.float32 \[5, 3\] on meta"),
        ({"b_dec": torch.zeros(4)}, r"b_dec is torch.float32 \[4\] on cpu, needs floating-point \[3\]"),
    ],
    ids=[
        "shapes-differ",
        "flat-without-offsets",
        "pairs-with-offsets",
        "float-indices",
        "index-too-large",
        "negative-index",
        "flat-weight",
        "two-devices",
        "bias-shape",
    ],
)
def test_decode_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    operands: dict[str, Any] = {
        "values": torch.zeros(4, 2),
        "indices": torch.zeros(4, 2, dtype=torch.int64),
        "W_dec": torch.zeros(5, 3),
    }
    with pytest.raises(ValueError, match=message):
        sk.decode(**(operands | change))


@pytest.mark.parametrize(
    "offsets,message",
    [
        ([0, 2, 5], "offsets from 0 to 5, needs rising ones from 0 to 6"),
        ([1, 2, 6], "offsets from 1 to 6"),
        ([0, 4, 2, 6], "needs rising ones"),
        ([0.0, 6.0], r"offsets torch.float32 \[2\] on cpu, needs int64 \[N \+ 1\]"),
    ],
    ids=["short", "not-from-zero", "falling", "float"],
)
def test_decode_refuses_offsets_that_do_not_fit(offsets: list[float], message: str) -> None:
    indices = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        sk.decode(torch.zeros(6), indices, torch.zeros(5, 3), offsets=torch.tensor(offsets))
