"""Encoding and decoding of every architecture against the formula, and what they refuse."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae import SAE, JumpReLUConfig, JumpReLUSAE, TopKConfig, TopKSAE, build_sae


def make(kind: str, *, d_in: int = 7, d_sae: int = 13, k: int = 3, dtype: torch.dtype = torch.float64) -> SAE:
    sae: SAE
    if kind == "topk":
        sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=d_sae, k=k), seed=1, hook_point="model.layers.1", dtype=dtype)
    else:
        sae = JumpReLUSAE(JumpReLUConfig(d_in=d_in, d_sae=d_sae), seed=1, hook_point="model.layers.1", dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if isinstance(sae, JumpReLUSAE):
            sae.threshold.copy_(torch.rand(d_sae, generator=generator))
    return sae


def dense_reference(sae: SAE, x: Tensor) -> Tensor:
    z = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    if isinstance(sae, JumpReLUSAE):
        return torch.where(z > sae.threshold, z, 0.0)
    assert isinstance(sae, TopKSAE)
    kept = torch.zeros_like(z)
    for row, values in enumerate(z):
        for feature in sorted(range(len(values)), key=lambda i: -float(values[i]))[: sae.cfg.k]:
            kept[row, feature] = max(float(values[feature]), 0.0)
    return kept


CASES = [
    pytest.param("topk", {}, id="topk"),
    pytest.param("topk", {"k": 1}, id="topk-k-1"),
    pytest.param("topk", {"k": 13}, id="topk-k-is-d-sae"),
    pytest.param("jumprelu", {}, id="jumprelu"),
]


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("num_tokens", [1, 11])
def test_encode_and_decode_follow_the_formula(kind: str, shape: dict[str, int], num_tokens: int) -> None:
    sae = make(kind, **shape)
    x = torch.randn(num_tokens, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    acts = dense_reference(sae, x)
    x_hat = acts @ sae.W_dec + sae.b_dec
    output = sae(x)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(output.x_hat, x_hat)
    torch.testing.assert_close(sae.decode(acts), x_hat)
    torch.testing.assert_close(sae.decode_sparse(output.top_acts, output.top_indices), x_hat)
    assert output.top_indices.dtype == torch.int64
    assert bool((output.top_acts >= 0).all())
    assert not output.top_indices[output.top_acts == 0].any()


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_encode_keeps_leading_dimensions(kind: str) -> None:
    sae = make(kind)
    x = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    acts = sae.encode(x)
    assert acts.shape == (2, 5, 13)
    torch.testing.assert_close(acts[1], sae.encode(x[1]))
    torch.testing.assert_close(sae.decode(acts)[1], sae(x[1]).x_hat)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_no_token_and_no_firing_feature_are_fine(kind: str) -> None:
    sae = make(kind)
    assert sae(torch.empty(0, 7)).x_hat.shape == (0, 7)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    output = sae(torch.randn(3, 7))
    torch.testing.assert_close(output.x_hat, sae.b_dec.expand(3, 7))
    assert not sae.encode(torch.randn(3, 7)).any()


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_bfloat16_activations_are_read_in_the_weights_dtype(kind: str) -> None:
    sae = make(kind, dtype=torch.float32)
    x = torch.randn(5, 7).bfloat16()
    assert sae(x).x_hat.dtype == torch.float32
    torch.testing.assert_close(sae(x).x_hat, sae(x.float()).x_hat)


def test_encoder_that_reads_x_itself() -> None:
    sae = make("topk")
    other = TopKSAE(TopKConfig(d_in=7, d_sae=13, k=3, apply_b_dec_to_input=False), dtype=torch.float64)
    other.load_state_dict(sae.state_dict())
    with torch.no_grad():
        other.b_enc -= sae.b_dec @ sae.W_enc
    x = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(other(x).x_hat, sae(x).x_hat)


def test_new_sae_is_tied_with_unit_rows_and_encoder_memory_by_feature() -> None:
    sae = build_sae(TopKConfig(d_in=16, d_sae=40, k=4), seed=5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.T.is_contiguous()
    assert not torch.equal(sae.W_dec, build_sae(sae.cfg, seed=6).W_dec)
    assert torch.equal(sae.W_dec, build_sae(sae.cfg, seed=5).W_dec)


def test_threshold_stays_float32_in_a_bfloat16_sae() -> None:
    sae = JumpReLUSAE(JumpReLUConfig(d_in=8, d_sae=16), dtype=torch.bfloat16)
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.threshold.dtype == torch.float32


@pytest.mark.parametrize("method", ["__call__", "encode", "encode_sparse"])
@pytest.mark.parametrize("shape", [(4, 6), (6,), ()], ids=str)
def test_other_width_is_refused_in_one_line(method: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"sae of 'model.layers.1': x has shape \[.*\], needs \[..., 7\]"):
        getattr(make("topk"), method)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        pytest.param(
            TopKConfig, {"d_sae": 0, "k": 1}, "d_sae: found 0, needs a positive number of features", id="d_sae-0"
        ),
        pytest.param(TopKConfig, {"d_sae": -4, "k": 1}, "d_sae: found -4, needs a positive", id="d_sae-negative"),
        pytest.param(TopKConfig, {"d_sae": 8, "k": 0}, "k is 0, needs a positive number", id="k-0"),
        pytest.param(TopKConfig, {"d_sae": 8, "k": 9}, "k is 9, needs at most d_sae = 8", id="k-too-large"),
        pytest.param(TopKConfig, {"d_sae": 8}, "missing key 'k'", id="no-k"),
        pytest.param(TopKConfig, {"d_sae": 8, "k": 2, "d_out": 3}, "unknown key 'd_out'", id="unknown-key"),
        pytest.param(TopKConfig, {"d_sae": "many", "k": 2}, "d_sae: found 'many'", id="wrong-type"),
        pytest.param(JumpReLUConfig, {"d_sae": 8, "target_l0": 0}, "target_l0 is 0.0, needs more than 0", id="l0-0"),
        pytest.param(
            JumpReLUConfig, {"d_sae": 8, "target_l0": 9}, "target_l0 is 9.0, needs .* at most d_sae", id="l0-large"
        ),
        pytest.param(JumpReLUConfig, {"d_sae": 8, "bandwidth": 0}, "bandwidth: found 0", id="bandwidth-0"),
    ],
)
def test_bad_configs_are_refused(
    cls: type[TopKConfig | JumpReLUConfig], values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cls.parse(values, where="sae")


def test_width_is_taken_from_the_store_or_compared_with_it() -> None:
    cfg = TopKConfig(d_sae=8, k=2)
    assert cfg.with_d_in(6).d_in == 6
    assert cfg.with_d_in(6).with_d_in(6).d_in == 6
    with pytest.raises(ConfigError, match="d_in is 6, needs the activations' width 7"):
        cfg.with_d_in(6).with_d_in(7)
    with pytest.raises(ConfigError, match="d_in is 0, needs the width"):
        build_sae(cfg)


def test_saved_sae_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    sae = make("jumprelu", dtype=torch.float32)
    sae.source["model"] = "somebody/model"
    sae.save(tmp_path)
    from saekit.sae import load_sae_folder

    loaded = load_sae_folder(tmp_path)
    x = torch.randn(9, 7)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert loaded.W_enc.T.is_contiguous()
    assert (loaded.cfg, loaded.hook_point, loaded.source) == (sae.cfg, "model.layers.1", {"model": "somebody/model"})


def test_nan_in_a_token_reaches_its_jumprelu_features_and_no_other_token() -> None:
    sae = make("jumprelu")
    x = torch.randn(3, 7, dtype=torch.float64)
    clean = sae(x)
    x[1, 0] = torch.nan
    output = sae(x)
    assert bool(output.x_hat[1].isnan().any())
    assert bool(output.top_acts[1].isnan().any())
    torch.testing.assert_close(output.x_hat[[0, 2]], clean.x_hat[[0, 2]])


def test_jumprelu_encoding_makes_no_dense_code() -> None:
    sae = JumpReLUSAE(JumpReLUConfig(d_in=8, d_sae=2048), seed=1)
    with torch.no_grad():
        sae.threshold.fill_(4.0)
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        sae(x)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # Kernels hold the pre-activations of 1,024 tokens at a time.
    assert largest <= 1024 * 2048 * 4


def test_gradients_of_jumprelu_encoding_equal_those_of_the_dense_code() -> None:
    sae = make("jumprelu")
    x = torch.randn(5, 7, dtype=torch.float64)
    weight = torch.randn(5, 13, dtype=torch.float64)
    (sae.encode(x) * weight).sum().backward()
    found = sae.W_enc.grad
    sae.W_enc.grad = None
    z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    (torch.where(z > sae.threshold, z, 0.0) * weight).sum().backward()
    torch.testing.assert_close(found, sae.W_enc.grad)
