"""Known defects of other libraries, put into ours: the named check must turn red."""

from collections.abc import Callable
from typing import Any

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _cpu, encode
from torch import Tensor


@pytest.fixture(autouse=True)
def _torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that the defects are put into."""
    monkeypatch.setenv("SAEKIT_KERNELS", "cpu")


Encode = Callable[[Tensor, Tensor, Tensor, int], sk.TopKCode]


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    W = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(30, generator=generator, dtype=torch.float64) - 1.5
    return x, W.requires_grad_(), b.requires_grad_()


def encoder_gradients(loss_of: Callable[[sk.TopKCode], Tensor], k: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of a loss of the code by our backward, and by dense autograd."""
    x, W, b = operands()
    mine = torch.autograd.grad(loss_of(sk.encode_topk(x, W.T, b, k)), [W, b])
    z = x @ W.T + b
    values, indices = z.topk(k)
    true = torch.autograd.grad(loss_of(sk.TopKCode(values.relu(), indices)), [W, b])
    return list(mine), list(true)


def auxiliary_loss_reaches_the_encoder() -> None:
    """A loss that reads the code beside the reconstruction has its gradient in the encoder."""
    weights = torch.linspace(-1, 2, 7 * 4, dtype=torch.float64).view(7, 4)
    mine, true = encoder_gradients(lambda code: (code.values * weights).sum(), 4)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(mine, true, strict=True))
    assert all(grad.abs().max() > 0 for grad in mine)


def clipped_entries_pass_no_gradient() -> None:
    """With k = F most selected pre-activations are negative; relu's gradient there is 0."""
    mine, true = encoder_gradients(lambda code: code.values.sum(), 30)
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(mine, true, strict=True))


def upstream_gradient_scales_ours() -> None:
    """Three times the loss, three times the gradient."""
    (once, _), (thrice, _) = (encoder_gradients(lambda code, s=s: code.values.sum() * s, 3)[0] for s in (1.0, 3.0))
    assert torch.allclose(once * 3, thrice)


def equal_values_go_to_the_lowest_index() -> None:
    code = sk.encode_topk(torch.ones(2, 1), torch.zeros(1, 64), torch.zeros(64), 5)
    assert code.indices.tolist() == [[0, 1, 2, 3, 4]] * 2


def repeated_features_add_up() -> None:
    """A feature that several tokens hold has the sum of their contributions."""
    W = torch.zeros(4, 1, requires_grad=True)
    sk.decode(torch.ones(3, 1), torch.full((3, 1), 2), W).sum().backward()
    assert W.grad is not None
    assert W.grad.flatten().tolist() == [0, 0, 3, 0]


CHECKS = [
    auxiliary_loss_reaches_the_encoder,
    clipped_entries_pass_no_gradient,
    upstream_gradient_scales_ours,
    equal_values_go_to_the_lowest_index,
    repeated_features_add_up,
]


def dropped_code_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """eai-sparsify 1.3.3, fused_encoder.py:53: the backward ignores the gradient of what it returned."""
    original = encode._linear_gradients
    monkeypatch.setattr(
        encode, "_linear_gradients", lambda ctx, grad, *rest: original(ctx, torch.zeros_like(grad), *rest)
    )


def gradient_through_clipped_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """eai-sparsify 1.3.3, fused_encoder.py:53: entries that relu set to 0 pass their gradient on."""

    def unmasked(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, W_enc, b_enc, _ = ctx.saved_tensors
        return *encode._linear_gradients(ctx, grads[0], x, W_enc, b_enc), None, None

    monkeypatch.setattr(encode._EncodeTopK, "backward", staticmethod(unmasked))


def upstream_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward written for loss = sum of the output."""
    original = encode._linear_gradients
    monkeypatch.setattr(encode, "_linear_gradients", lambda ctx, grad, *rest: original(ctx, grad.sign(), *rest))


def ties_left_to_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.topk alone: which of two equal values it takes is open."""
    monkeypatch.setattr(_cpu, "_exact_topk", lambda z, k: torch.topk(z.flip(1), k, dim=1))


def last_contribution_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assignment where a sum was meant (the chained-index defect of dictionary_learning, p_anneal.py:122, is its kin)."""

    def assign(values: Tensor, reverse: sk.ReverseIndex, rows: Tensor, *, dtype: torch.dtype) -> Tensor:
        out = rows.new_zeros(reverse.num_features, rows.shape[1])
        out[reverse.entries.indices] = values.reshape(-1, 1) * rows[reverse.entries.rows()]
        return out.to(dtype)

    monkeypatch.setattr(_cpu, "scatter_sum", assign)


MUTATIONS = [
    (dropped_code_gradient, auxiliary_loss_reaches_the_encoder),
    (gradient_through_clipped_entries, clipped_entries_pass_no_gradient),
    (upstream_taken_for_one, upstream_gradient_scales_ours),
    (ties_left_to_topk, equal_values_go_to_the_lowest_index),
    (last_contribution_wins, repeated_features_add_up),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_passes_on_our_code(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("mutate,check", MUTATIONS, ids=lambda function: function.__name__)
def test_check_catches_the_defect(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None]
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
