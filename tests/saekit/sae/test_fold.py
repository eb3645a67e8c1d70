"""Folding the input normalisation gives the same dictionary of raw activations."""

import copy
from collections.abc import Callable

import pytest
import torch

from saekit.errors import NonFiniteError
from saekit.sae import (
    SAE,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    MatryoshkaTopKConfig,
    Normalization,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build_sae,
)

D_IN, D_SAE = 9, 21
CONFIGS: dict[str, tuple[type[SAEConfig], dict[str, object]]] = {
    "topk": (TopKConfig, {"k": 4}),
    "jumprelu": (JumpReLUConfig, {}),
    "batchtopk": (BatchTopKConfig, {"k": 4}),
    "matryoshka_topk": (MatryoshkaTopKConfig, {"k": 4}),
    "matryoshka_batchtopk": (MatryoshkaBatchTopKConfig, {"k": 4}),
    "relu": (ReLUConfig, {}),
    "gated": (GatedConfig, {}),
}


def random_sae(kind: str, *, apply_b_dec_to_input: bool) -> SAE:
    cls, values = CONFIGS[kind]
    shape = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": apply_b_dec_to_input}
    sae = build_sae(cls.parse(shape | values)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values if name == "threshold" else values - 0.5)
    sae.normalize_decoder()
    return sae


def normalization_of(x: torch.Tensor) -> Normalization:
    centred = x - x.mean(0)
    return Normalization.from_moments(
        x.mean(0),
        mean_norm_centred=float(centred.norm(dim=1).mean()),
        mean_square_centred=float(centred.square().sum(1).mean()),
    )


def raw_activations() -> torch.Tensor:
    return 37.0 * torch.randn(200, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 11.0


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False], ids=["centred-input", "plain-input"])
def test_folded_sae_equals_the_sae_of_normalised_activations(kind: str, apply_b_dec_to_input: bool) -> None:
    x = raw_activations()
    normalization = normalization_of(x)
    sae = random_sae(kind, apply_b_dec_to_input=apply_b_dec_to_input)
    folded = copy.deepcopy(sae)
    normalization.fold(folded)
    expected = sae((x - normalization.mean) * normalization.scale)
    found = folded(x)
    assert torch.equal(found.top_indices, expected.top_indices)
    assert (found.top_acts * normalization.scale - expected.top_acts).abs().max() < 1e-10
    assert ((found.x_hat - normalization.mean) * normalization.scale - expected.x_hat).abs().max() < 1e-10
    assert torch.equal(folded.W_dec, sae.W_dec)
    normalization.unfold(folded)
    for name, parameter in folded.named_parameters():
        assert (parameter - sae.get_parameter(name)).abs().max() < 1e-10, name


def _forgets(what: str) -> Callable[[Normalization, SAE], None]:
    def fold(normalization: Normalization, sae: SAE) -> None:
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        normalization.fold(sae)
        sae.get_parameter(what).data.copy_(before[what])

    return fold


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("jumprelu", "b_dec"),
        ("jumprelu", "b_enc"),
        ("jumprelu", "threshold"),
        ("batchtopk", "threshold"),
        ("gated", "b_enc"),
        ("gated", "b_mag"),
    ],
)
def test_a_fold_that_forgets_a_tensor_would_be_seen(kind: str, what: str) -> None:
    x = raw_activations()
    normalization = normalization_of(x)
    sae = random_sae(kind, apply_b_dec_to_input=True)
    expected = sae(normalization.apply(x)).x_hat
    _forgets(what)(normalization, sae)
    assert ((sae(x).x_hat - normalization.mean) * normalization.scale - expected).abs().max() > 1e-3


def test_normalised_activations_have_mean_zero_and_mean_norm_sqrt_d() -> None:
    x = raw_activations()
    normalization = normalization_of(x)
    normal = normalization.apply(x)
    torch.testing.assert_close(normal.mean(0), torch.zeros(D_IN, dtype=torch.float64))
    assert float(normal.norm(dim=1).mean()) == pytest.approx(D_IN**0.5)
    assert float(normal.square().sum(1).mean()) == pytest.approx(normalization.total_variance)
    assert normalization.apply(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("mean", "norm"), [(float("nan"), 1.0), (0.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))], ids=str
)
def test_data_that_cannot_be_normalised_is_refused(mean: float, norm: float) -> None:
    with pytest.raises(NonFiniteError, match="needs finite activations that vary"):
        Normalization.from_moments(torch.full((3,), mean), mean_norm_centred=norm, mean_square_centred=norm)
