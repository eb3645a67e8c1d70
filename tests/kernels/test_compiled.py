"""What only the compiled kernels do: one pass over wide rows, other vector widths, threads, dtypes that they leave to torch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _build, _compiled, _cpu
from torch import Tensor

INF = float("inf")


@pytest.fixture(params=["this machine", "portable"])
def compiled(request: pytest.FixtureRequest, compiled_backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend, built for this processor and for any."""
    if request.param == "portable":
        portable = _build._library("DEFAULT")
        monkeypatch.setattr(_build, "library", lambda: portable)
    return compiled_backend


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def with_entries(entries: dict[int, float]) -> Tensor:
    z = randn(3, 1500)
    for column, value in entries.items():
        z[:, column] = value
    return z


# Over 8k + 64 columns wide, so that rows have a bound to pass, and widths that no vector divides.
ROWS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "random": (lambda: randn(5, 4611), 32),
    "k-is-one": (lambda: randn(5, 1029), 1),
    "zeros": (lambda: torch.zeros(3, 1000), 8),
    "signed-zeros": (lambda: torch.where(randn(3, 1000) < 0, 0.0, -0.0), 8),
    "integer-ties": (lambda: randn(4, 2000).mul(2).round(), 40),
    "ties-with-the-bound-come-later": (lambda: torch.cat([torch.ones(2, 300), torch.ones(2, 700)], 1), 8),
    "all-negative": (lambda: -randn(3, 2000).abs() - 1, 8),
    "denormals": (lambda: randn(3, 2000) * 1e-41, 8),
    "rising": (lambda: torch.arange(3001.0).repeat(2, 1), 33),
    "falling": (lambda: -torch.arange(3001.0).repeat(2, 1), 33),
    "all-kept": (lambda: randn(3, 700).round(), 700),
    "all-but-one-kept": (lambda: randn(3, 700).round(), 699),
    "minus-inf": (lambda: torch.full((2, 1000), -INF), 5),
    "fewer-finite-than-k": (lambda: torch.where(torch.arange(1000) % 300 == 299, 1.0, -INF).repeat(2, 1), 5),
    "late-inf": (lambda: with_entries({1400: INF, 1499: INF, 700: -INF}), 4),
    "late-nan": (lambda: with_entries({1400: math.nan, 1499: -math.nan, 3: INF}), 4),
    "more-nan-than-k": (lambda: with_entries(dict.fromkeys(range(0, 1500, 7), math.nan)), 4),
    "huge": (lambda: randn(3, 2000) * 1e38, 8),
}


@pytest.mark.parametrize("case", ROWS)
def test_wide_rows_are_selected_as_by_the_reference(compiled: str, case: str) -> None:
    make, k = ROWS[case]
    z = make()
    zeros = torch.zeros(z.shape[1])
    # Products with unit vectors are exact, but 0 * inf is not 0: non-finite values come in as the bias of one token each.
    for row in z:
        operands = torch.zeros(1, 1), torch.zeros(1, len(row)), row
        found = sk.encode_topk(*operands, k, backend=compiled)  # type: ignore[arg-type]
        expected = sk.encode_topk(*operands, k, backend="reference")
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.values.nan_to_num(-1.0), expected.values.nan_to_num(-1.0))
        bound = zeros + row.nan_to_num(0.0).median()
        marked = sk.encode_threshold(*operands, bound, backend=compiled)  # type: ignore[arg-type]
        kept = sk.encode_threshold(*operands, bound, backend="reference")
        assert torch.equal(marked.indices, kept.indices)
        assert torch.equal(marked.pre_acts.nan_to_num(-1.0), kept.pre_acts.nan_to_num(-1.0))
        assert torch.equal(marked.offsets, kept.offsets)


@pytest.mark.parametrize("d_in", [1, 3, 8, 31, 64, 65, 130])
@pytest.mark.parametrize("layout", ["pairs", "csr"])
def test_sums_of_every_width_equal_the_reference(compiled: str, d_in: int, layout: str, assert_close: Any) -> None:
    generator = torch.Generator().manual_seed(d_in)
    indices = torch.randint(200, (40, 7), generator=generator)
    indices[:, 0] = 5
    offsets = None
    if layout == "csr":
        indices = indices.flatten()
        offsets = torch.cat([torch.zeros(2), torch.full((3,), 90.0), torch.tensor([91.0, 280.0, 280.0])]).long()
    values = torch.randn(indices.shape, generator=generator)
    W_dec, b_dec = torch.randn(200, d_in, generator=generator), torch.randn(d_in, generator=generator)
    results = []
    for name, dtype in ((compiled, torch.float32), ("reference", torch.float64)):
        leaves = [tensor.clone().to(dtype).requires_grad_() for tensor in (values, W_dec, b_dec)]
        x_hat = sk.decode(leaves[0], indices, leaves[1], leaves[2], offsets=offsets, backend=name)  # type: ignore[arg-type]
        (x_hat * torch.linspace(-1, 2, d_in).to(dtype)).square().sum().backward()
        results.append([x_hat, *(leaf.grad for leaf in leaves)])
    for found, true in zip(*results, strict=True):
        assert_close(found, true, 3e-6)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_sums_over_few_or_no_tokens(compiled: str, num_rows: int) -> None:
    values, indices = torch.ones(num_rows, 2, requires_grad=True), torch.ones(num_rows, 2, dtype=torch.int32)
    W_dec = torch.ones(300, 5, requires_grad=True)
    x_hat = sk.decode(values, indices, W_dec, backend=compiled)  # type: ignore[arg-type]
    x_hat.sum().backward()
    assert x_hat.tolist() == [[2.0] * 5] * num_rows
    assert W_dec.grad is not None
    assert W_dec.grad[1].tolist() == [2.0 * num_rows] * 5


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(compiled: str, threads: Callable[[int], None]) -> None:
    z, W = randn(200, 300), randn(900, 40)
    results = []
    for count in (1, 2, 3):
        threads(count)
        values, indices = torch.empty(200, 5), torch.empty(200, 5, dtype=torch.int64)
        _compiled._run("topk", z, torch.zeros(300), values, indices, *z.shape, 5)
        x_hat = sk.decode(values, indices, W, backend=compiled)  # type: ignore[arg-type]
        reverse = sk.reverse_index(indices, 900)
        results.append((indices, x_hat, _compiled.scatter_sum(values, reverse, x_hat, dtype=torch.float32)))
    assert all(torch.equal(one, other) for more in results[1:] for one, other in zip(results[0], more, strict=True))


def test_other_dtypes_between_ops_go_through_torch_operators(compiled_backend: str) -> None:
    """What backward hands over may differ from the operands: the module takes any dtype, as `_cpu` does."""
    values, indices = torch.rand(4, 3, dtype=torch.float64), torch.arange(12).view(4, 3)
    entries = sk.reverse_index(indices, 40).entries
    weight = torch.rand(40, 6, dtype=torch.float64)
    found = _compiled.gather_sum(values, entries, weight, dtype=torch.float64)
    assert torch.equal(found, _cpu.gather_sum(values, entries, weight, dtype=torch.float64))
    half = weight.bfloat16()
    assert _compiled.gather_dot(half[:4], entries, half, dtype=torch.bfloat16).dtype == torch.bfloat16
