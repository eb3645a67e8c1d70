"""Backward of encode and decode: every gradient against dense autograd in float64, and what the backward may cost."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from bench.shapes import TEST_SHAPES, Shape
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dense_topk(problem: Any, k: int) -> Tensor:
    """x_hat with plain dense operators; autograd through it is the truth."""
    z = problem.x @ problem.W_enc_rows.T + problem.b_enc
    selected = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :k]
    is_selected = torch.zeros_like(z, dtype=torch.bool).scatter(1, selected, True)
    return torch.where(is_selected, z.relu(), 0) @ problem.W_dec + problem.b_dec


def sparse_topk(problem: Any, k: int, backend: str) -> Tensor:
    code = sk.encode_topk(problem.x, problem.W_enc_rows.T, problem.b_enc, k, backend=backend)  # type: ignore[arg-type]
    return sk.decode(code.values, code.indices, problem.W_dec, problem.b_dec, backend=backend)  # type: ignore[arg-type]


def dense_jumprelu(problem: Any, threshold: Tensor, bandwidth: float) -> Tensor:
    z = problem.x @ problem.W_enc_rows.T + problem.b_enc
    acts = torch.where(z > threshold, z, 0) + torch.where((z - threshold).abs() < bandwidth / 2, 0.5 * z, 0)
    return acts @ problem.W_dec + problem.b_dec


def sparse_jumprelu(problem: Any, threshold: Tensor, bandwidth: float, backend: str) -> Tensor:
    code = sk.encode_threshold(
        problem.x,
        problem.W_enc_rows.T,
        problem.b_enc,
        threshold,
        bandwidth=bandwidth,
        backend=backend,  # type: ignore[arg-type]
    )
    edge = threshold[code.indices]
    acts = torch.where(code.pre_acts > edge, code.pre_acts, 0)
    acts = acts + torch.where((code.pre_acts - edge).abs() < bandwidth / 2, 0.5 * code.pre_acts, 0)
    return sk.decode(acts, code.indices, problem.W_dec, problem.b_dec, offsets=code.offsets, backend=backend)  # type: ignore[arg-type]


def upstream_like(x_hat: Tensor) -> Tensor:
    """A gradient from above that is not 1, and whose size differs between tokens."""
    return torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.7


@pytest.mark.parametrize(
    "shape,dtype",
    [(TEST_SHAPES[0], torch.bfloat16), (TEST_SHAPES[0], torch.float16)]
    + [(shape, dtype) for shape in TEST_SHAPES for dtype in (torch.float64, torch.float32)],
    ids=lambda value: value.name if isinstance(value, Shape) else str(value),
)
def test_topk_gradients_equal_dense_autograd(
    backend: str, device: str, shape: Shape, dtype: torch.dtype, make_problem: Any, assert_close: Any, tolerances: Any
) -> None:
    drawn = make_problem(shape.num_tokens, shape.d_in, shape.d_sae, dtype=dtype)
    truth, mine = drawn.to(torch.float64), drawn.to(dtype, device)
    expected, found = dense_topk(truth, shape.k), sparse_topk(mine, shape.k, backend)
    upstream = upstream_like(expected)
    expected.backward(upstream)
    found.backward(upstream.to(found))
    assert_close(found, expected, tolerances[dtype].output)
    for mine_grad, true_grad, operand in zip(mine.gradients(), truth.gradients(), mine, strict=True):
        assert_close(mine_grad, true_grad, tolerances[dtype].gradient)
        assert mine_grad is not None
        assert mine_grad.dtype == operand.dtype


@pytest.mark.parametrize(
    "bandwidth,dtype", [(0.0, torch.float32), *((0.5, dtype) for dtype in DTYPES)], ids=lambda value: str(value)
)
def test_threshold_gradients_equal_dense_autograd(
    backend: str,
    device: str,
    dtype: torch.dtype,
    bandwidth: float,
    make_problem: Any,
    assert_close: Any,
    tolerances: Any,
) -> None:
    drawn = make_problem(9, 17, 23, dtype=dtype)
    truth, mine = drawn.to(torch.float64), drawn.to(dtype, device)
    threshold = (torch.rand(23, generator=torch.Generator().manual_seed(0)) + 0.5).double()
    expected = dense_jumprelu(truth, threshold, bandwidth)
    found = sparse_jumprelu(
        mine, threshold.to(device, torch.float64 if dtype == torch.float64 else torch.float32), bandwidth, backend
    )
    upstream = upstream_like(expected)
    expected.backward(upstream)
    found.backward(upstream.to(found))
    assert_close(found, expected, tolerances[dtype].output)
    for mine_grad, true_grad in zip(mine.gradients(), truth.gradients(), strict=True):
        assert_close(mine_grad, true_grad, tolerances[dtype].gradient)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_gradients_pass_finite_differences(name: str, make_problem: Any) -> None:
    problem = make_problem(3, 4, 12, seed=2).to(torch.float64)
    threshold = torch.full((12,), 0.2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *operands: sparse_topk(type(problem)(*operands), 4, name), tuple(problem))
    assert torch.autograd.gradcheck(
        lambda *operands: sparse_jumprelu(type(problem)(*operands), threshold, 0.1, name), tuple(problem)
    )


PATTERNS: dict[str, Callable[[int, int], Tensor]] = {
    "one-feature-on-every-token": lambda n, f: torch.cat([torch.full((n, 1), 3), torch.arange(n).view(n, 1) % f], 1),
    "one-index-repeated-in-a-row": lambda n, f: torch.full((n, 4), f - 1),
    "empty-features": lambda n, f: torch.zeros(n, 2, dtype=torch.int64),
    "unused-places-at-index-0": lambda n, f: torch.cat([torch.arange(n).view(n, 1) % f, torch.zeros(n, 3).long()], 1),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_gradients_of_uneven_features(
    backend: str, device: str, pattern: str, assert_close: Any, short_items: None, poisoned_memory: None
) -> None:
    n, f, d = 41, 11, 6
    indices = PATTERNS[pattern](n, f)
    values = torch.randn(indices.shape, dtype=torch.float64)
    W_dec, upstream = torch.randn(f, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    true_values, true_weight = values.clone().requires_grad_(), W_dec.clone().requires_grad_()
    torch.einsum("nk,nkd->nd", true_values, true_weight[indices]).backward(upstream)
    mine_values = values.float().to(device).requires_grad_()
    mine_weight = W_dec.float().to(device).requires_grad_()
    x_hat = sk.decode(mine_values, indices.to(device), mine_weight, backend=backend)  # type: ignore[arg-type]
    x_hat.backward(upstream.to(x_hat))
    assert_close(mine_values.grad, true_values.grad, 3e-6)
    assert_close(mine_weight.grad, true_weight.grad, 3e-6)


@pytest.mark.parametrize("layout", ["pairs", "csr"])
def test_dense_sums_equal_the_sparse_ones(monkeypatch: pytest.MonkeyPatch, layout: str, assert_close: Any) -> None:
    from saekit_kernels import _dense

    monkeypatch.setattr(_dense, "BLOCK_ROWS", 4)
    indices = torch.randint(9, (11, 3), generator=torch.Generator().manual_seed(0))
    offsets = None
    if layout == "csr":
        indices, offsets = indices.flatten(), torch.tensor([0, 0, 5, 5, 5, 6, 20, 21, 30, 33, 33])
    values, W_dec = torch.randn(indices.shape, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    results = []
    for min_density in (0.0, 2.0):
        monkeypatch.setattr(_dense, "MIN_DENSITY", min_density)
        leaves = values.clone().requires_grad_(), W_dec.clone().requires_grad_()
        x_hat = sk.decode(leaves[0], indices, leaves[1], offsets=offsets, backend="cpu")
        x_hat.square().sum().backward()
        results.append([x_hat, leaves[0].grad, leaves[1].grad])
    for dense, sparse in zip(*results, strict=True):
        assert_close(dense, sparse, 1e-12)


def test_encode_threshold_gradients_of_a_hot_feature(
    backend: str, device: str, make_problem: Any, assert_close: Any, short_items: None, poisoned_memory: None
) -> None:
    drawn = make_problem(20, 5, 13)
    truth, mine = drawn.to(torch.float64), drawn.to(torch.float32, device)
    threshold = torch.full((13,), 1.0, dtype=torch.float64)
    threshold[7] = -9.0
    expected = dense_jumprelu(truth, threshold, 0.0)
    found = sparse_jumprelu(mine, threshold.float().to(device), 0.0, backend)
    upstream = upstream_like(expected)
    expected.backward(upstream)
    found.backward(upstream.to(found))
    for mine_grad, true_grad in zip(mine.gradients(), truth.gradients(), strict=True):
        assert_close(mine_grad, true_grad, 3e-6)


@pytest.mark.parametrize("layout", ["transposed view of [F, D]", "contiguous [D, F]"])
def test_encoder_gradient_has_the_layout_of_the_parameter(
    fast_backend: str, device: str, layout: str, make_problem: Any
) -> None:
    problem = make_problem(5, 6, 20).to(torch.float32, device)
    weight = problem.W_enc_rows.detach()
    if layout.startswith("transposed"):
        W_enc = weight.T.requires_grad_()
        incoming: list[int] = []
        W_enc.register_hook(lambda grad: incoming.append(grad.data_ptr()))
    else:
        W_enc = weight.T.contiguous().requires_grad_()
    sk.encode_topk(problem.x, W_enc, problem.b_enc, 3, backend=fast_backend).values.sum().backward()  # type: ignore[arg-type]
    assert W_enc.grad is not None
    assert W_enc.grad.stride() == W_enc.stride()
    if layout.startswith("transposed"):
        # Not one element was copied on the way from the kernel to .grad.
        assert incoming == [W_enc.grad.data_ptr()]


@pytest.mark.parametrize("needed", range(5), ids=["x", "W_enc", "b_enc", "W_dec", "b_dec"])
def test_backward_computes_only_what_is_asked(fast_backend: str, device: str, needed: int, make_problem: Any) -> None:
    everything = make_problem(5, 6, 20).to(torch.float32, device)
    sparse_topk(everything, 3, fast_backend).sum().backward()
    alone = type(everything)(*(t.detach().requires_grad_(i == needed) for i, t in enumerate(everything)))
    sparse_topk(alone, 3, fast_backend).sum().backward()
    for position, (mine, full) in enumerate(zip(alone.gradients(), everything.gradients(), strict=True)):
        assert (mine is None) == (position != needed)
        assert mine is None or full is None or torch.equal(mine, full)


def test_backward_makes_no_dense_code(fast_backend: str, device: str, make_problem: Any, operators: Any) -> None:
    num_tokens, d_in, d_sae, k = 30, 8, 24, 2
    problem = make_problem(num_tokens, d_in, d_sae).to(torch.float32, device)
    x_hat = sparse_topk(problem, k, fast_backend)
    with operators() as seen:
        x_hat.backward(torch.ones_like(x_hat))
    # The largest is a gradient: neither the N * F code (720 numbers) nor the N * k * D contributions (480).
    assert seen.num_bytes <= 4 * max(num_tokens, d_sae) * d_in


def test_encode_and_decode_share_one_reverse_index(
    fast_backend: str, device: str, make_problem: Any, operators: Any
) -> None:
    problem = make_problem(9, 8, 24).to(torch.float32, device)
    x_hat = sparse_topk(problem, 2, fast_backend)
    with operators() as seen:
        x_hat.sum().backward()
    assert sum("sort" in operator and "search" not in operator for operator in seen.names) == 1


def test_results_are_bit_equal_twice(
    fast_backend: str, device: str, two_threads: None, make_problem: Any, short_items: None
) -> None:
    sizes = (12, 8, 10) if fast_backend == "triton" else (600, 40, 300)

    def run() -> list[Tensor]:
        problem = make_problem(*sizes).to(torch.float32, device)
        x_hat = sparse_topk(problem, 6, fast_backend)
        x_hat.square().sum().backward()
        return [x_hat, *(grad for grad in problem.gradients() if grad is not None)]

    first, second = run(), run()
    assert len(first) == 6
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    """torch's own setting, under which an operator without a deterministic implementation raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("is_dense", [False, True], ids=["sparse", "dense-blocks"])
def test_torch_s_deterministic_mode_changes_no_bit(
    fast_backend: Any, device: str, is_dense: bool, make_problem: Any, request: pytest.FixtureRequest
) -> None:
    def run() -> list[Tensor]:
        problem = make_problem(3, 8, 20).to(torch.float32, device)
        loss = sparse_topk(problem, 8 if is_dense else 2, fast_backend).square().sum()
        dead = problem.W_enc_rows[::2], problem.b_enc[::2], problem.W_dec[::2]
        loss = loss + sk.auxk(problem.x, dead[0].T, dead[1], dead[2], 3, backend=fast_backend).square().sum()
        loss.backward()
        return [loss, *(grad for grad in problem.gradients() if grad is not None)]

    plain = run()
    request.getfixturevalue("deterministic_algorithms")
    assert all(torch.equal(one, other) for one, other in zip(plain, run(), strict=True))


def test_no_result_depends_on_uninitialised_memory(
    fast_backend: str, device: str, make_problem: Any, poisoned_memory: None, small_chunks: None
) -> None:
    problem = make_problem(6, 9, 33).to(torch.float32, device)
    threshold = torch.full((33,), 0.9, device=device)
    loss = sparse_topk(problem, 5, fast_backend).sum()
    (loss + sparse_jumprelu(problem, threshold, 0.2, fast_backend).sum()).backward()
    for grad in problem.gradients():
        assert grad is not None
        assert grad.isfinite().all()
        assert grad.abs().max() < 1e6


def test_backward_refuses_indices_that_were_changed(fast_backend: str, device: str, make_problem: Any) -> None:
    problem = make_problem(4, 6, 40).to(torch.float32, device)
    code = sk.encode_topk(problem.x, problem.W_enc_rows.T, problem.b_enc, 3, backend=fast_backend)  # type: ignore[arg-type]
    code.indices.zero_()
    with pytest.raises(RuntimeError, match="indices were changed in place"):
        code.values.sum().backward()


def test_gradient_reaches_every_code_of_one_encoder(
    backend: str, device: str, make_problem: Any, assert_close: Any
) -> None:
    """Two codes, k and 4k, of one encoder (Multi-TopK): the encoder's gradient is the sum of both terms'."""
    drawn = make_problem(6, 9, 20)
    truth, mine = drawn.to(torch.float64), drawn.to(torch.float32, device)
    (dense_topk(truth, 3).square().sum() + dense_topk(truth, 12).square().sum() / 8).backward()
    small, large = sparse_topk(mine, 3, backend), sparse_topk(mine, 12, backend)
    (small.square().sum() + large.square().sum() / 8).backward()
    for mine_grad, true_grad in zip(mine.gradients(), truth.gradients(), strict=True):
        assert_close(mine_grad, true_grad, 3e-6)


def test_autocast_changes_nothing(fast_backend: str, device: str, make_problem: Any) -> None:
    plain, cast = (make_problem(5, 6, 20).to(torch.float32, device) for _ in range(2))
    sparse_topk(plain, 3, fast_backend).sum().backward()
    with torch.autocast(device, dtype=torch.bfloat16):
        sparse_topk(cast, 3, fast_backend).sum().backward()
    for one, other in zip(plain.gradients(), cast.gradients(), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
