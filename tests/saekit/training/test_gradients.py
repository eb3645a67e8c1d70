"""Closed forms that dense autograd in float64 has to give: BatchTopK's whole step, and estimators at the edges of their band."""

import pytest
import torch
from torch import Tensor

from saekit.sae import BatchTopKConfig, BatchTopKSAE
from saekit.sae.losses import jumprelu, step_penalty
from saekit.training import TrainConfig
from saekit.training.build import build_objective
from saekit.training.objective import Objective

D_IN, D_SAE, VARIANCE = 7, 13, 5.0
DEAD = torch.tensor([1, 4, 5, 9])


def make(k: int, *, bias: float = 0.0) -> tuple[Objective, dict[str, Tensor]]:
    """An objective with random weights, and copies of its parameters for a dense formula."""
    generator = torch.Generator().manual_seed(4)
    sae = BatchTopKSAE(BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=k), dtype=torch.float64)
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    sae.b_enc.data += bias
    config = TrainConfig(num_tokens=1000, k_aux=2)
    objective = build_objective(sae, config, total_variance=VARIANCE)
    return objective, {name: p.detach().clone().requires_grad_() for name, p in objective.trained_parameters().items()}


def dense_loss(p: dict[str, Tensor], x: Tensor, k: int, dead: Tensor) -> Tensor:
    """The batch's N * k largest positive entries by a sort of all of them, and AuxK by masking the dictionary."""
    inputs = x - p["b_dec"]
    z = inputs @ p["W_enc"] + p["b_enc"]
    kept = torch.zeros(z.numel(), dtype=z.dtype)
    kept[z.detach().flatten().argsort(descending=True, stable=True)[: len(x) * k]] = 1.0
    error = x - (z.relu() * kept.view_as(z)) @ p["W_dec"] - p["b_dec"]
    loss = error.square().sum(1).mean() / VARIANCE
    if not len(dead):
        return loss
    residual = error.detach()
    silent = (inputs.detach() @ p["W_enc"][:, dead] + p["b_enc"][dead]).relu()
    places = silent.topk(2, dim=1).indices
    acts = torch.zeros_like(silent).scatter(1, places, silent.gather(1, places))
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    return loss + (residual - acts @ p["W_dec"][dead]).square().sum(1).mean() / variance / 32


@pytest.mark.parametrize("dead", [DEAD, DEAD[:0]], ids=["dead", "none-dead"])
@pytest.mark.parametrize(
    ("k", "bias", "num_tokens"),
    [(3, 0.0, 11), (1, 0.0, 11), (D_SAE, 0.0, 11), (3, 0.0, 2), (5, -1.5, 11)],
    ids=["k3", "k1", "k-all", "two-tokens", "few-positive"],
)
def test_batchtopk_step_equals_dense_autograd(k: int, bias: float, num_tokens: int, dead: Tensor) -> None:
    objective, p = make(k, bias=bias)
    x = torch.randn(num_tokens, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    result, expected = objective(x, dead), dense_loss(p, x, k, dead)
    torch.testing.assert_close(result.loss, expected)
    assert int(result.num_active) <= num_tokens * k
    assert (int(result.num_active) < num_tokens * k) == (bias < 0 or k == D_SAE)
    (3.0 * result.loss).backward()
    (3.0 * expected).backward()
    for name, parameter in objective.trained_parameters().items():
        assert parameter.grad is not None
        wanted = p[name].grad
        assert wanted is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)


# Pre-activations by their distance from a threshold of 1 with a band of 0.5: binary fractions, so that edges are exact.
DISTANCES = [-0.5, -0.25, -0.25 + 2**-40, -0.125, 0.0, 2**-40, 0.125, 0.25 - 2**-40, 0.25, 0.5]
IS_NEAR = [False, False, True, True, True, True, True, True, False, False]


@pytest.mark.parametrize("ste_to_input", [False, True])
def test_estimates_are_the_closed_form_up_to_the_edges_of_the_band(ste_to_input: bool) -> None:
    near = torch.tensor(IS_NEAR, dtype=torch.float64)
    active = torch.tensor([distance > 0 for distance in DISTANCES], dtype=torch.float64)
    upstream = torch.linspace(1.0, 2.0, len(DISTANCES), dtype=torch.float64)
    for name in ("value", "count"):
        z = (1.0 + torch.tensor(DISTANCES, dtype=torch.float64)).requires_grad_()
        threshold = torch.ones(len(DISTANCES), dtype=torch.float64, requires_grad=True)
        if name == "value":
            found = jumprelu(z, threshold, 0.5, ste_to_input=ste_to_input)
            assert torch.equal(found.detach(), z.detach() * active)
            (found * upstream).sum().backward()
            slope, through = upstream * near * 1.0 / 0.5, upstream * active
        else:
            count = step_penalty(z, threshold, 0.5, num_tokens=4, ste_to_input=ste_to_input)
            assert float(count.detach()) == float(active.sum()) / 4
            count.backward()
            slope, through = near / 0.5 / 4, torch.zeros_like(active)
        assert threshold.grad is not None
        assert torch.equal(threshold.grad, -slope), name
        expected = through + (slope if ste_to_input else 0.0)
        found_grad = torch.zeros_like(active) if z.grad is None else z.grad
        assert torch.equal(found_grad, expected), name
