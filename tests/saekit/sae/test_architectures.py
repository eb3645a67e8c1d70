"""Gated, ReLU and Matryoshka SAEs against their formulas; their configs and folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae import (
    SAE,
    GatedConfig,
    GatedSAE,
    MatryoshkaBatchTopKConfig,
    MatryoshkaTopKConfig,
    ReLUConfig,
    ReLUSAE,
    SAEConfig,
    build_sae,
    load_sae_folder,
)

SHAPE: dict[str, object] = {"d_in": 7, "d_sae": 13}
CONFIGS: dict[str, SAEConfig] = {
    "relu": ReLUConfig.parse(SHAPE | {"p_end": 0.5, "is_norm_weighted": False}),
    "gated": GatedConfig.parse(SHAPE | {"target_l0": 3}),
    "matryoshka_topk": MatryoshkaTopKConfig.parse(SHAPE | {"k": 3, "group_fractions": [0.25, 0.75]}),
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig.parse(SHAPE | {"k": 3, "group_weights": [1, 1, 1, 1, 2]}),
}


def make(kind: str) -> SAE:
    sae = build_sae(CONFIGS[kind], hook_point="model.layers.1").double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.abs() if name == "threshold" else drawn)
    return sae


def tokens(num: int = 11) -> Tensor:
    return torch.randn(num, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def dense_acts(sae: SAE, x: Tensor) -> Tensor:
    inner = (x - sae.b_dec) @ sae.W_enc
    z = inner + sae.b_enc
    if isinstance(sae, GatedSAE):
        return (sae.r_mag.exp() * inner + sae.b_mag).relu() * (z > 0)
    if isinstance(sae, ReLUSAE):
        return z.relu()
    if "threshold" in dict(sae.named_parameters()):
        return z * (z > sae.get_parameter("threshold"))
    return torch.zeros_like(z).scatter(1, z.topk(3, dim=1).indices, 1.0) * z.relu()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_encode_and_decode_follow_the_formula(kind: str, num_tokens: int) -> None:
    sae, x = make(kind), tokens(num_tokens)
    acts = dense_acts(sae, x)
    output = sae(x)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(output.x_hat, acts @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae.decode_sparse(output.top_acts, output.top_indices), output.x_hat)
    assert bool((output.top_acts >= 0).all())
    assert not output.top_indices[output.top_acts == 0].any()


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_gradients_of_encoding_equal_those_of_the_dense_code(kind: str) -> None:
    sae, x = make(kind), tokens()
    weight = torch.randn(11, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    grads = []
    for encode in (sae.encode, lambda x: dense_acts(sae, x)):
        sae.zero_grad()
        (encode(x) * weight).sum().backward()
        # The step of a gate passes no gradient, so its bias has none, or zeros in the dense form.
        grads.append(
            {n: p.grad for n, p in sae.named_parameters() if p.grad is not None and (n != "b_enc" or kind == "relu")}
        )
    torch.testing.assert_close(grads[0], grads[1])


def test_reset_gated_sae_is_a_new_one() -> None:
    sae = make("gated")
    sae.reset_parameters(5)
    for name, value in build_sae(CONFIGS["gated"], seed=5).named_parameters():
        torch.testing.assert_close(sae.get_parameter(name), value.double())


def test_nan_reaches_the_code_of_a_gated_token() -> None:
    sae, x = make("gated"), tokens(3)
    clean = sae(x)
    x[1, 0] = torch.nan
    output = sae(x)
    assert bool(output.top_acts[1].isnan().any())
    torch.testing.assert_close(output.x_hat[[0, 2]], clean.x_hat[[0, 2]])


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_folder_gives_the_same_sae_bit_for_bit(kind: str, tmp_path: Path) -> None:
    sae = make(kind).float()
    sae.save(tmp_path)
    loaded = load_sae_folder(tmp_path)
    assert (type(loaded), loaded.cfg, loaded.hook_point) == (type(sae), sae.cfg, "model.layers.1")
    assert torch.equal(loaded(tokens()).x_hat, sae(tokens()).x_hat)
    assert loaded.W_enc.T.is_contiguous()


def test_absorbed_decoder_norms_leave_the_reconstruction() -> None:
    sae, x = make("relu"), tokens()
    assert isinstance(sae, ReLUSAE)
    before = sae(x).x_hat
    norms = sae.W_dec.norm(dim=1)
    acts = sae.encode(x)
    sae.absorb_decoder_norms()
    torch.testing.assert_close(sae(x).x_hat, before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(13, dtype=torch.float64))
    torch.testing.assert_close(sae.encode(x), acts * norms)


@pytest.mark.parametrize(
    ("d_sae", "fractions", "weights", "expected"),
    [
        pytest.param(64, None, None, [(2, 0.2), (6, 0.2), (14, 0.2), (30, 0.2), (64, 0.2)], id="default"),
        pytest.param(10, [0.5, 0.5], [1.0, 3.0], [(5, 0.25), (10, 0.75)], id="weights"),
        pytest.param(7, [1.0], None, [(7, 1.0)], id="one-group"),
        pytest.param(2, [0.1, 0.1, 0.8], None, [(1, 2 / 3), (2, 1 / 3)], id="smaller-than-its-groups"),
        pytest.param(3, [1 / 3, 1 / 3, 1 / 3], None, [(1, 1 / 3), (2, 1 / 3), (3, 1 / 3)], id="thirds"),
    ],
)
def test_prefixes_are_nested_and_end_with_all_features(
    d_sae: int, fractions: list[float] | None, weights: list[float] | None, expected: list[tuple[int, float]]
) -> None:
    values: dict[str, object] = {"d_sae": d_sae, "k": 1, "group_weights": weights}
    if fractions is not None:
        values["group_fractions"] = fractions
    prefixes = MatryoshkaTopKConfig.parse(values).prefixes()
    assert [end for end, _ in prefixes] == [end for end, _ in expected]
    assert [weight for _, weight in prefixes] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("parse", "values", "message"),
    [
        (MatryoshkaTopKConfig.parse, {"k": 14}, "k is 14, needs at most d_sae = 13"),
        (MatryoshkaTopKConfig.parse, {"k": 2, "group_fractions": [0.5, 0.6]}, "need positive numbers that add up to 1"),
        (MatryoshkaTopKConfig.parse, {"k": 2, "group_fractions": [1.5, -0.5]}, "need positive numbers"),
        (MatryoshkaTopKConfig.parse, {"k": 2, "group_fractions": []}, "need positive numbers"),
        (MatryoshkaBatchTopKConfig.parse, {"k": 2, "group_weights": [1, 2]}, "need 5 numbers, none negative"),
        (GatedConfig.parse, {"target_l0": 14}, "target_l0 is 14.0, needs .* at most d_sae"),
        (ReLUConfig.parse, {"target_l0": 0}, "target_l0 is 0.0, needs more than 0"),
        (ReLUConfig.parse, {"p_end": 0}, "p_end: found 0"),
        (ReLUConfig.parse, {"p_end": 1.5}, "p_end: found 1.5"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(
    parse: Callable[[dict[str, object]], SAEConfig], values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(SHAPE | values)
