"""Crosscoders and multi-layer SAEs: formulas, both layouts of x, exact folds, and what one layer of them is."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.hub import load_sae, save_sae
from saekit.sae import (
    MLSAE,
    BatchTopKCrosscoderConfig,
    Crosscoder,
    MLSAEConfig,
    Normalization,
    ReLUCrosscoder,
    ReLUCrosscoderConfig,
    SiteNormalization,
    SitesConfig,
    SitesSAE,
    TopKCrosscoderConfig,
    build_sae,
)
from saekit.sae.batch import batch_width, num_samples, num_targets, split_batch, token_code

S, D, F, K = 3, 5, 11, 3
SHAPE: dict[str, object] = {"d_in": D, "num_sites": S, "d_sae": F}
CONFIGS: dict[str, SitesConfig] = {
    "topk": TopKCrosscoderConfig.parse(SHAPE | {"k": K}),
    "batchtopk": BatchTopKCrosscoderConfig.parse(SHAPE | {"k": K}),
    "relu": ReLUCrosscoderConfig.parse(SHAPE | {"target_l0": 3}),
    "mlsae": MLSAEConfig.parse(SHAPE | {"k": K}),
    "mlsae-bare": MLSAEConfig.parse(SHAPE | {"k": K, "apply_b_dec_to_input": False}),
}
CROSSCODERS = [kind for kind in CONFIGS if not kind.startswith("mlsae")]


def make(kind: str) -> SitesSAE:
    sae = build_sae(CONFIGS[kind], hook_point="a,b,c:input").double()
    assert isinstance(sae, SitesSAE)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if not name.startswith("site_"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if kind == "batchtopk":
            sae.get_parameter("threshold").fill_(0.7)
    sae.normalize_decoder()
    return sae


def raw(num: int = 200) -> Tensor:
    """Sites of very different sizes, [num, S, D]."""
    x = torch.randn(num, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x * torch.tensor([[0.3], [4.0], [90.0]]) + torch.tensor([[1.0], [-2.0], [50.0]])


def normalization(x: Tensor) -> SiteNormalization:
    def of(x: Tensor) -> Normalization:
        centred = x - x.mean(0)
        return Normalization.from_moments(
            x.mean(0),
            mean_norm_centred=float(centred.norm(dim=1).mean()),
            mean_square_centred=float(centred.square().sum(1).mean()),
        )

    sites = tuple(of(x[:, site]) for site in range(S))
    return SiteNormalization(sites=sites, total_variance=sum(site.total_variance for site in sites))


def kept(kind: str, z: Tensor) -> Tensor:
    if kind == "relu":
        return z.relu()
    if kind == "batchtopk":
        return z * (z > 0.7)
    return torch.zeros_like(z).scatter(-1, z.topk(K, dim=-1).indices, 1.0) * z.relu()


@pytest.mark.parametrize("kind", CROSSCODERS)
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_crosscoder_follows_the_formula_site_by_site(kind: str, num_tokens: int) -> None:
    sae, x = make(kind), raw()[:num_tokens] / 40
    W_enc, W_dec = sae.W_enc.reshape(S, D, F), sae.W_dec.reshape(F, S, D)
    acts = kept(kind, sum(x[:, s] @ W_enc[s] for s in range(S)) + sae.b_enc)
    x_hat = torch.stack([acts @ W_dec[:, s] + sae.b_dec.reshape(S, D)[s] for s in range(S)], dim=1)
    output = sae(x)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(output.x_hat, x_hat)
    torch.testing.assert_close(sae.decode(acts), x_hat)
    torch.testing.assert_close(sae.decode_sparse(output.top_acts, output.top_indices), x_hat)
    flat = sae(x.flatten(1))
    assert torch.equal(flat.x_hat, output.x_hat.flatten(1))
    assert torch.equal(sae.encode(x[None]), sae.encode(x)[None])


@pytest.mark.parametrize("kind", ["mlsae", "mlsae-bare"])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_multi_layer_sae_follows_the_formula(kind: str, num_tokens: int) -> None:
    sae, whole = make(kind), raw()
    assert isinstance(sae, MLSAE)
    normalization(whole).fold(sae)
    x = whole[:num_tokens]
    u = (x - sae.site_mean) * sae.site_scale[:, None]
    z = (u - sae.b_dec if kind == "mlsae" else u) @ sae.W_enc + sae.b_enc
    acts = kept(kind, z)  # [N, S, F]
    x_hat = sae.site_mean + (acts @ sae.W_dec + sae.b_dec) / sae.site_scale[:, None]
    output = sae(x)
    assert output.top_acts.shape == output.top_indices.shape == (num_tokens, S, K)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(output.x_hat, x_hat)
    torch.testing.assert_close(sae.decode(acts), x_hat)
    assert torch.equal(sae(x.flatten(1)).x_hat, output.x_hat.flatten(1))
    assert torch.equal(sae.encode(x[None]), sae.encode(x)[None])


def test_multi_layer_sae_at_a_layer_is_a_topk_sae_in_raw_units() -> None:
    sae, x = make("mlsae"), raw()
    assert isinstance(sae, MLSAE)
    normalization(x).fold(sae)
    output = sae(x)
    for number, name in enumerate(["a", "b", "c:input"]):
        one = sae.at(name)
        assert (one.hook_point, one.d_in, one.cfg.kind) == (name, D, "topk")
        found = one(x[:, number])
        torch.testing.assert_close(found.x_hat, output.x_hat[:, number], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.top_acts * sae.site_scale[number], output.top_acts[:, number])
        torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
        assert torch.equal(sae.at(number).W_dec, one.W_dec)
    with pytest.raises(ConfigError, match="found hook point 'd', needs one of a, b, c:input"):
        sae.at("d")
    with pytest.raises(ConfigError, match="found hook point number 3, needs 0 to 2"):
        sae.at(3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_folded_dictionary_equals_the_one_of_normalised_sites(kind: str) -> None:
    x, sae = raw(), make(kind)
    normal = normalization(x)
    folded = copy.deepcopy(sae)
    normal.fold(folded)
    scales = torch.tensor(normal.scale, dtype=torch.float64)[:, None]
    means = torch.stack([site.mean for site in normal.sites])
    expected, found = sae(normal.apply(x.flatten(1))), folded(x)
    assert torch.equal(found.top_indices, expected.top_indices)
    assert (found.top_acts - expected.top_acts).abs().max() < 1e-10
    assert ((found.x_hat - means) * scales - expected.x_hat.reshape(x.shape)).abs().max() < 1e-10
    normal.unfold(folded)
    for name, parameter in folded.named_parameters():
        assert (parameter - sae.get_parameter(name)).abs().max() < 1e-10, name


@pytest.mark.parametrize("kind", CROSSCODERS)
def test_size_of_a_decoder_is_the_sum_of_its_sites_norms_and_shares_survive_the_fold(kind: str) -> None:
    sae = make(kind)
    assert isinstance(sae, Crosscoder)
    norms = sae.W_dec.reshape(F, S, D).norm(dim=2)
    torch.testing.assert_close(norms.sum(1), torch.ones(F, dtype=torch.float64))
    torch.testing.assert_close(sae.site_shares(), norms.detach())
    normalization(raw()).fold(sae)
    assert (sae.W_dec.reshape(F, S, D).norm(dim=2) - norms).abs().max() > 0.1
    torch.testing.assert_close(sae.site_shares(), norms.detach())


def test_absorbed_norms_leave_a_crosscoders_reconstruction() -> None:
    sae, x = make("relu"), raw(20) / 40
    assert isinstance(sae, ReLUCrosscoder)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 3.0, F, dtype=torch.float64)[:, None])
    before, norms = sae(x).x_hat, sae.decoder_norms().detach()
    acts = sae.encode(x)
    sae.absorb_decoder_norms()
    torch.testing.assert_close(sae(x).x_hat, before)
    torch.testing.assert_close(sae.encode(x), acts * norms)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(F, dtype=torch.float64))


@pytest.mark.parametrize("kind", CONFIGS)
def test_new_dictionary_has_one_direction_for_all_sites_and_a_tied_encoder(kind: str) -> None:
    sae = build_sae(CONFIGS[kind], seed=4)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(F))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.T.is_contiguous()
    if isinstance(sae, Crosscoder):
        rows = sae.W_dec.reshape(F, S, D)
        assert torch.equal(rows[:, 0], rows[:, 2])


@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_dictionary_is_the_same_bit_for_bit_by_every_door(kind: str, tmp_path: Path) -> None:
    sae, x = make(kind), raw(20).float()
    normalization(raw()).fold(sae)
    sae = sae.float()
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert isinstance(loaded, SitesSAE)
    assert (type(loaded), loaded.cfg, loaded.hook_points) == (type(sae), sae.cfg, ("a", "b", "c:input"))
    assert loaded.hook_point_out == "c:input"
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, sae.get_parameter(name)), name
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    with pytest.raises(ConfigError, match="needs a dictionary of one site"):
        save_sae(sae, tmp_path / "other", format="saelens")


def test_rows_of_a_batch() -> None:
    crosscoder, mlsae = make("topk"), make("mlsae")
    x = raw(7).flatten(1)
    assert (batch_width(crosscoder), num_samples(crosscoder), num_targets(crosscoder)) == (S * D, 1, S)
    assert (batch_width(mlsae), num_samples(mlsae), num_targets(mlsae)) == (S * D, S, S)
    assert split_batch(crosscoder, x) == (x, x)
    inputs, target = split_batch(mlsae, x)
    assert inputs is x
    assert torch.equal(target, raw(7).reshape(-1, D))


def test_code_of_a_token_has_each_feature_once_at_its_largest() -> None:
    sae, x = make("mlsae"), raw(30) / 40
    acts, indices = token_code(sae, x.flatten(1))
    dense = torch.zeros(30, F, dtype=torch.float64).scatter_add(1, indices, acts)
    assert (sae.encode(x) > 0).sum(1).max() > 1
    torch.testing.assert_close(dense, sae.encode(x).amax(1))
    assert not indices[acts == 0].any()
    crosscoder = make("topk")
    for found, expected in zip(token_code(crosscoder, x.flatten(1)), crosscoder.encode_sparse(x), strict=True):
        assert torch.equal(found, expected)


def test_written_rows_are_those_of_the_last_site() -> None:
    features = torch.tensor([4, 0])
    for kind in CONFIGS:
        sae, x = make(kind), raw()
        normalization(x).fold(sae)
        one = torch.zeros(2, S, F, dtype=torch.float64) if isinstance(sae, MLSAE) else torch.zeros(2, F).double()
        nothing = sae.decode(one)
        one[torch.arange(2), ..., features] = 1.0
        torch.testing.assert_close(sae.written_rows(features), (sae.decode(one) - nothing)[:, -1])


@pytest.mark.parametrize("shape", [(4, D), (4, S + 1, D), (4, S, D - 1), (S * D + 1,), ()], ids=str)
@pytest.mark.parametrize("kind", ["topk", "mlsae"])
def test_other_shapes_are_refused_in_one_line(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"sae of 'a,b,c:input': x has shape .*, needs \[..., 3, 5\]"):
        make(kind)(torch.zeros(shape))


def test_number_of_sites_is_taken_or_compared() -> None:
    cfg = TopKCrosscoderConfig.parse({"d_in": D, "d_sae": F, "k": K})
    assert cfg.with_num_sites(2).with_num_sites(2).num_sites == 2
    with pytest.raises(ConfigError, match="num_sites is 2, needs the number of hook points 3"):
        cfg.with_num_sites(2).with_num_sites(3)
    with pytest.raises(ConfigError, match=r"num_sites: .*needs at least 2 hook points"):
        cfg.with_num_sites(1)
    with pytest.raises(ConfigError, match="num_sites is 0, needs the number of hook points"):
        build_sae(cfg)
    with pytest.raises(ConfigError, match="apply_b_dec_to_input: found True"):
        TopKCrosscoderConfig.parse(SHAPE | {"k": K, "apply_b_dec_to_input": True})
    with pytest.raises(ConfigError, match="is_norm_weighted: found False"):
        ReLUCrosscoderConfig.parse(SHAPE | {"is_norm_weighted": False})
