"""BatchTopK: exactly the largest entries of the batch in training, one threshold afterwards."""

import pytest
import torch
from torch import Tensor

from saekit.sae import BatchTopKConfig, BatchTopKSAE
from saekit.sae.batchtopk import encode_batch_topk


def weights(d_in: int, d_sae: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64).T, 0.1 * torch.randn(
        d_sae, generator=generator, dtype=torch.float64
    )


def dense_code(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    acts = (x @ W_enc + b_enc).relu()
    kept = torch.zeros_like(acts)
    order = acts.flatten().argsort(descending=True)[: len(x) * k]
    kept.view(-1)[order] = acts.flatten()[order]
    return kept


def dense_of(code: tuple[Tensor, Tensor, Tensor], num_tokens: int, d_sae: int) -> Tensor:
    values, indices, offsets = code
    rows = torch.repeat_interleave(torch.arange(num_tokens), offsets.diff())
    return torch.zeros(num_tokens, d_sae, dtype=values.dtype).index_put((rows, indices), values)


@pytest.mark.parametrize(
    ("num_tokens", "d_sae", "k", "loud"),
    [(40, 64, 3, 1.0), (1, 17, 4, 1.0), (9, 16, 16, 1.0), (40, 64, 2, 50.0), (3, 7, 1, 1.0)],
    ids=["usual", "one token", "k = d_sae", "one token takes nearly all", "small"],
)
def test_batch_keeps_its_largest_entries(num_tokens: int, d_sae: int, k: int, loud: float) -> None:
    W_enc, b_enc = weights(11, d_sae)
    x = torch.randn(num_tokens, 11, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x[0] *= loud
    code = encode_batch_topk(x, W_enc, b_enc, k)
    torch.testing.assert_close(dense_of(code, num_tokens, d_sae), dense_code(x, W_enc, b_enc, k))


def test_gradients_equal_those_of_the_dense_code() -> None:
    W_enc, b_enc = weights(11, 64)
    x = torch.randn(20, 11, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    grads = []
    for sparse in (True, False):
        W, b = W_enc.clone().requires_grad_(), b_enc.clone().requires_grad_()
        code = dense_of(encode_batch_topk(x, W, b, 3), 20, 64) if sparse else dense_code(x, W, b, 3)
        (code.square() * torch.arange(64)).sum().backward()
        grads.append((W.grad, b.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_inference_is_by_one_threshold_whatever_the_batch() -> None:
    sae = BatchTopKSAE(BatchTopKConfig(d_in=11, d_sae=64, k=3), dtype=torch.float64)
    with torch.no_grad():
        sae.threshold.fill_(0.7)
    x = torch.randn(20, 11, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = torch.where(pre_acts > 0.7, pre_acts, 0.0)
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae.encode(x[:1]), expected[:1])


@pytest.mark.parametrize(("k", "message"), [(0, "needs a positive number"), (65, "needs at most d_sae = 64")])
def test_bad_k_is_refused(k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchTopKConfig(d_in=11, d_sae=64, k=k)
