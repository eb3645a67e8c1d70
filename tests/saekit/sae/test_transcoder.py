"""Transcoders: another width, a linear skip, and pairs of normalised activations folded exactly."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae import Normalization, PairNormalization, Transcoder, TranscoderConfig, build_sae, load_sae_folder

D_IN, D_OUT, D_SAE = 7, 5, 13


def make(*, has_skip: bool) -> Transcoder:
    sae = Transcoder(TranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=3, has_skip=has_skip), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    sae.normalize_decoder()
    return sae


def raw_pairs(num: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randn(num, D_IN + D_OUT, dtype=torch.float64, generator=generator)
    return pairs * torch.tensor([40.0] * D_IN + [0.3] * D_OUT) + 5.0


def pair_normalization(pairs: Tensor) -> PairNormalization:
    def of(x: Tensor) -> Normalization:
        centred = x - x.mean(0)
        return Normalization.from_moments(
            x.mean(0),
            mean_norm_centred=float(centred.norm(dim=1).mean()),
            mean_square_centred=float(centred.square().sum(1).mean()),
        )

    return PairNormalization(inputs=of(pairs[:, :D_IN]), targets=of(pairs[:, D_IN:]))


@pytest.mark.parametrize("has_skip", [True, False], ids=["skip", "no-skip"])
def test_prediction_follows_the_formula(has_skip: bool) -> None:
    sae, x = make(has_skip=has_skip), raw_pairs(11)[:, :D_IN]
    z = x @ sae.W_enc + sae.b_enc
    acts = torch.zeros_like(z).scatter(1, z.topk(3, dim=1).indices, 1.0) * z.relu()
    expected = acts @ sae.W_dec + sae.b_dec
    if sae.W_skip is not None:
        expected = expected + x @ sae.W_skip
    torch.testing.assert_close(sae(x).x_hat, expected)
    torch.testing.assert_close(sae.encode(x), acts)
    assert (sae.d_in, sae.d_out) == (D_IN, D_OUT)


@pytest.mark.parametrize("has_skip", [True, False], ids=["skip", "no-skip"])
def test_folded_transcoder_equals_the_one_of_normalised_pairs(has_skip: bool) -> None:
    pairs = raw_pairs()
    normalization = pair_normalization(pairs)
    sae = make(has_skip=has_skip)
    folded = copy.deepcopy(sae)
    normalization.fold(folded)
    expected = sae(normalization.apply(pairs)[:, :D_IN])
    found = folded(pairs[:, :D_IN])
    assert torch.equal(found.top_indices, expected.top_indices)
    scale, mean = normalization.targets.scale, normalization.targets.mean
    assert (found.top_acts * scale - expected.top_acts).abs().max() < 1e-10
    assert ((found.x_hat - mean) * scale - expected.x_hat).abs().max() < 1e-10
    assert torch.equal(folded.W_dec, sae.W_dec)
    normalization.unfold(folded)
    for name, parameter in folded.named_parameters():
        assert (parameter - sae.get_parameter(name)).abs().max() < 1e-10, name


def test_new_transcoder_has_unit_rows_and_no_linear_part() -> None:
    sae = build_sae(TranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=3, has_skip=True), seed=1)
    assert isinstance(sae, Transcoder)
    assert sae.W_skip is not None
    assert not sae.W_skip.any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.ones(D_SAE))
    assert sae.W_enc.T.is_contiguous()


@pytest.mark.parametrize("has_skip", [True, False], ids=["skip", "no-skip"])
def test_saved_transcoder_is_the_same_bit_for_bit(has_skip: bool, tmp_path: Path) -> None:
    sae = make(has_skip=has_skip).float()
    sae.save(tmp_path)
    loaded = load_sae_folder(tmp_path)
    x = torch.randn(9, D_IN)
    assert loaded.cfg == sae.cfg
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)


def test_widths_are_taken_or_compared() -> None:
    cfg = TranscoderConfig(d_sae=8, k=2)
    assert cfg.with_d_in(6).with_d_out(4).with_d_out(4).d_out == 4
    with pytest.raises(ConfigError, match="d_out is 4, needs the predicted activations' width 5"):
        cfg.with_d_out(4).with_d_out(5)
    with pytest.raises(ConfigError, match="d_out is 0, needs the predicted width"):
        build_sae(cfg.with_d_in(6))
    with pytest.raises(ConfigError, match="apply_b_dec_to_input: found True"):
        TranscoderConfig.parse({"d_sae": 8, "k": 2, "apply_b_dec_to_input": True})
