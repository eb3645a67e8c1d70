"""Null rows against NumPy: principal components, calibrated sparsity, fitted gain."""

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.evaluation.nulls import (
    fit_sample,
    mean_candidate,
    measured_l0,
    pca_candidate,
    random_candidate,
    sae_candidate,
)
from saekit.sae import (
    SAE,
    Dictionary,
    DictionaryConfig,
    GatedConfig,
    GatedSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    ReLUConfig,
    ReLUSAE,
    TopKConfig,
    TopKSAE,
)
from saekit.sae.activation import ReLU, TopK


@pytest.fixture
def x() -> Tensor:
    """400 tokens of width 12 with unequal variances, off the origin."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator) * torch.linspace(3, 0.2, 12)
    return torch.randn(400, 12, generator=generator) @ mixing.T + 5


def _sae(kind: str) -> SAE:
    if kind == "topk":
        return TopKSAE(TopKConfig(d_in=12, d_sae=64, k=6), seed=7)
    if kind == "relu":
        return ReLUSAE(ReLUConfig(d_in=12, d_sae=64), seed=7)
    if kind == "gated":
        return GatedSAE(GatedConfig(d_in=12, d_sae=64), seed=7)
    sae = JumpReLUSAE(JumpReLUConfig(d_in=12, d_sae=64, apply_b_dec_to_input=False), seed=7)
    with torch.no_grad():
        sae.threshold.fill_(2.0)
    return sae


def _fvu(x: Tensor, x_hat: Tensor) -> float:
    a, b = x.double(), x_hat.detach().double()
    return float((a - b).square().sum() / (a - a.mean(0)).square().sum())


@pytest.mark.parametrize("num_components", [1, 4, 12, 50])
def test_pca_candidate_equals_the_singular_value_decomposition(x: Tensor, num_components: int) -> None:
    candidate = pca_candidate(x, num_components)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    singular = np.linalg.svd(centred, compute_uv=False)
    kept = min(num_components, 12)
    assert _fvu(x, candidate.reconstruct(x).x_hat) == pytest.approx(
        (singular[kept:] ** 2).sum() / (singular**2).sum(), abs=1e-6
    )
    assert candidate.constant_l0 == kept
    assert candidate.title == f"PCA, {kept} components"


def test_pca_candidate_is_fitted_on_what_it_is_given(x: Tensor) -> None:
    """Fitted on tokens without the first direction, it cannot see that direction in others."""
    flat = x.clone()
    flat[:, 0] = flat[:, 0].mean()
    x_hat = pca_candidate(flat, 3).reconstruct(x).x_hat
    assert x_hat[:, 0].std() < 1e-4
    assert x[:, 0].std() > 0.5


@pytest.mark.parametrize("activation", [ReLU(), TopK(k=6, negative="keep")], ids=lambda spec: spec.kind)
def test_random_candidate_of_a_released_dictionary_fires_as_often(x: Tensor, activation: ReLU | TopK) -> None:
    tensors = {
        "W_enc": torch.randn(12, 64),
        "b_enc": torch.zeros(64),
        "W_dec": torch.randn(64, 12),
        "b_dec": torch.zeros(12),
    }
    sae = Dictionary(DictionaryConfig(d_in=12, d_sae=64, d_out=12, activation=activation), tensors)
    code = random_candidate(sae, x, l0=6, seed=0).reconstruct(x).top_acts
    assert code is not None
    assert float((code > 0).sum() / len(x)) == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_random_candidate_fires_as_often_as_the_sae(x: Tensor, kind: str) -> None:
    sae = _sae(kind)
    l0 = measured_l0(sae, x, batch_tokens=64)
    candidate = random_candidate(sae, x, l0=l0, seed=0)
    code = candidate.reconstruct(x).top_acts
    assert code is not None
    assert float((code > 0).sum() / len(x)) == pytest.approx(l0, rel=0.01)
    assert candidate.num_features == 64


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "gated"])
def test_random_candidate_calibrates_to_a_given_l0(x: Tensor, kind: str) -> None:
    for l0 in (0.5, 3.0, 20.0):
        made = random_candidate(_sae(kind), x, l0=l0, seed=0).reconstruct(x)
        assert made.top_acts is not None
        assert float((made.top_acts > 0).sum() / len(x)) == pytest.approx(l0, rel=0.02)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_random_candidate_has_the_best_gain(x: Tensor, kind: str) -> None:
    """Around the mean, no other scale of the reconstruction is closer."""
    candidate = random_candidate(_sae(kind), x, l0=6.0, seed=0)
    mean, x_hat = x.mean(0), candidate.reconstruct(x).x_hat
    errors = [_fvu(x, mean + gain * (x_hat - mean)) for gain in (0.9, 0.99, 1.0, 1.01, 1.1)]
    assert np.argmin(errors) == 2
    assert errors[2] < 1.0


def test_random_candidate_keeps_nothing_of_the_sae(x: Tensor) -> None:
    """Another SAE of the same shape gives the same null; the SAE itself stays as it was."""
    one, other = _sae("topk"), TopKSAE(TopKConfig(d_in=12, d_sae=64, k=6), seed=8)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    a = random_candidate(one, x, l0=6.0, seed=3).reconstruct(x).x_hat
    b = random_candidate(other, x, l0=6.0, seed=3).reconstruct(x).x_hat
    c = random_candidate(one, x, l0=6.0, seed=4).reconstruct(x).x_hat
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_random_candidate_of_a_silent_sae_answers_the_mean(x: Tensor) -> None:
    x_hat = random_candidate(_sae("jumprelu"), x, l0=0.0, seed=0).reconstruct(x).x_hat
    assert torch.allclose(x_hat, x.mean(0).expand_as(x), atol=1e-5)


def test_measured_l0_equals_a_dense_count(x: Tensor) -> None:
    sae = _sae("jumprelu")
    assert measured_l0(sae, x, batch_tokens=33) == pytest.approx(float((sae.encode(x) > 0).sum() / len(x)))


def test_sae_candidate_equals_its_forward(x: Tensor) -> None:
    sae = _sae("jumprelu")
    made = sae_candidate(sae).reconstruct(x)
    assert torch.allclose(made.x_hat, sae.decode(sae.encode(x)), atol=1e-4)


def test_mean_candidate_answers_one_vector(x: Tensor) -> None:
    mean = x.double().mean(0)
    assert torch.equal(mean_candidate(mean).reconstruct(x).x_hat, mean.expand(400, -1))


def test_fit_sample_draws_without_replacement_and_in_random_order() -> None:
    values = torch.arange(1000, dtype=torch.float32)[:, None]
    read = lambda flat: values[torch.from_numpy(flat)]  # noqa: E731
    found = fit_sample(read, np.arange(1000), num_tokens=400, seed=0)[:, 0]
    assert len(found.unique()) == 400
    assert 300 < found[:50].mean() < 700
    assert len(fit_sample(read, np.arange(10), num_tokens=400, seed=0)) == 10
