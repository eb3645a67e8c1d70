"""Rarer members of the families, against their formulas: normalised crosscoders, checkpoints, scales kept outside the files."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub import load_sae, save_sae
from saekit.hub.canonical import threshold_over
from saekit.sae.activation import MatchingPursuit, pursue
from saekit.sae.dictionary import Dictionary
from saekit.sae.lorsa import LorsaDictionary
from saekit.sae.multilayer import MultiLayerDictionary

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
Changed = Callable[..., Path]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 2e-5)


SCORES: dict[int, Callable[[Tensor], Tensor]] = {
    1: lambda norms: norms.sum(0),
    2: lambda norms: norms.square().sum(0).sqrt(),
    3: lambda norms: 0.5 * norms.square().sum(0).sqrt() + 0.25 * norms.sum(0),
    4: lambda norms: torch.ones_like(norms[0]),
}


@pytest.mark.parametrize("code", SCORES)
def test_crosscoder_compares_by_its_code_normalization(code: int, changed: Changed) -> None:
    alphas = {"code_normalization_alpha_sae": 0.5, "code_normalization_alpha_cc": 0.25}
    stored = load_file(FIXTURES / "sof_crosscoder" / "model.safetensors")
    x = draw(40, 2, 24)
    a = (torch.einsum("nld,ldf->nf", x, stored["encoder.weight"]) + stored["encoder.bias"]).relu()
    scored = a * SCORES[code](stored["decoder.weight"].norm(dim=2))
    level = float(scored[scored > 0].median())
    tensors = {"threshold": torch.tensor(level), "code_normalization_id": torch.tensor(code)}
    acts = load_sae(changed("sof_crosscoder", alphas, tensors)).encode(x)
    assert close(acts, a * (scored > level))
    assert 0 < (acts > 0).sum() < (a > 0).sum()


def test_decoupled_crosscoder_has_activations_of_each_layer(changed: Changed) -> None:
    level = torch.tensor([1.5, 4.0])
    tensors = {"threshold": level, "code_normalization_id": torch.tensor(5)}
    sae = load_sae(changed("sof_crosscoder", tensors=tensors))
    stored, x = load_file(FIXTURES / "sof_crosscoder" / "model.safetensors"), draw(9, 2, 24)
    a = (torch.einsum("nld,ldf->nf", x, stored["encoder.weight"]) + stored["encoder.bias"]).relu()[:, None]
    acts = a * (a * stored["decoder.weight"].norm(dim=2) > level[:, None])
    assert close(sae.encode(x), acts)
    x_hat = torch.einsum("nlf,lfd->nld", acts, stored["decoder.weight"]) + stored["decoder.bias"]
    assert close(sae(x).x_hat, x_hat)


def test_crosscoder_with_normalised_inputs_reads_raw_ones(changed: Changed) -> None:
    mean, scale = draw(2, 24), torch.tensor([0.3, 0.7])
    tensors = {"activation_mean": mean, "activation_std": torch.ones(2, 24), "activation_global_scale": scale}
    sae = load_sae(changed("sof_crosscoder", {"target_rms": 1.0}, tensors))
    plain, x = load_sae(FIXTURES / "sof_crosscoder"), draw(9, 2, 24, seed=1)
    u = (x - mean) * scale[:, None]
    assert close(sae.encode(x), plain.encode(u))
    assert (sae(x).x_hat - (plain(u).x_hat / (scale[:, None] + 1e-8) + mean)).abs().max() <= 1e-4


def test_crosscoders_normalisation_with_nan_is_off(changed: Changed) -> None:
    tensors = {"activation_std": torch.ones(2, 24), "activation_global_scale": torch.full((2,), 2.0)}
    sae, x = load_sae(changed("sof_crosscoder", tensors=tensors)), draw(9, 2, 24)
    assert torch.equal(sae.encode(x), load_sae(FIXTURES / "sof_crosscoder").encode(x))


def test_crosscoder_may_read_some_layers_only(changed: Changed) -> None:
    folder = changed("sof_crosscoder", {"encoder_layers": [2, 0], "num_layers": 3})
    sae, plain, x = load_sae(folder), load_sae(FIXTURES / "sof_crosscoder"), draw(9, 3, 24)
    assert close(sae.encode(x), plain.encode(x[:, [2, 0]]))


def test_threshold_over_a_norm_of_zero_says_what_the_product_would() -> None:
    threshold, norms = torch.tensor([1.0, 0.0, -1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 2.0])
    p = torch.tensor([[1e30, 1e30, 1e30, 1e30], [-1e30, -1e30, -1e30, -1e30], [0.4, 0.4, 0.4, 0.6]])
    found = threshold_over(threshold, norms)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(p > found, p * norms > threshold)


@pytest.mark.parametrize("fixture", ["llamascopium_sae_jumprelu", "llamascopium_crosscoder_jumprelu"])
def test_feature_without_a_decoder_is_never_active(fixture: str, changed: Changed) -> None:
    stored = load_file(FIXTURES / fixture / "sae_weights.safetensors")["W_D"]
    stored[..., 3, :] = 0
    sae = load_sae(changed(fixture, tensors={"W_D": stored}))
    layers = (sae.cfg.num_layers_in,) if isinstance(sae, MultiLayerDictionary) else ()
    acts = sae.encode(50 * draw(64, *layers, sae.d_in))
    assert not bool(acts[..., 3].any())
    assert bool((acts != 0).any())


def scaled(folder: Path, values: dict[str, Any]) -> tuple[Dictionary, Dictionary, float]:
    """A dictionary whose config says that its input is scaled, and the same one without."""
    plain = load_sae(FIXTURES / "saelens_v6_standard")
    shutil.copytree(FIXTURES / "saelens_v6_standard", folder)
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")
    sae = load_sae(folder)
    assert isinstance(plain, Dictionary)
    assert isinstance(sae, Dictionary)
    return sae, plain, float(sae.W_enc.flatten()[0] / plain.W_enc.flatten()[0])


@pytest.mark.parametrize(
    ("folder", "scale"),
    [
        ("sae_group_gpt2_blocks.3.hook_mlp_out_24576:v0", 1.8958522157897557),
        ("gemma_2b_blocks.12.hook_resid_post_16384", 0.21381938399317255),
    ],
)
@pytest.mark.parametrize("asked", ["expected_average_only_in", True])
def test_scale_that_only_saelens_registry_has_is_applied(
    folder: str, scale: float, asked: str | bool, tmp_path: Path
) -> None:
    sae, plain, found = scaled(tmp_path / folder, {"normalize_activations": asked})
    x = draw(9, 32)
    assert found == pytest.approx(scale)
    assert close(sae.encode(x), plain.encode(x * scale))
    assert close(sae(x).x_hat, plain(x * scale).x_hat / scale)


@pytest.mark.parametrize("asked", ["none", False, None])
def test_known_scale_is_left_out_where_the_config_asks_for_none(asked: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "gemma_2b_blocks.12.hook_resid_post_16384"
    assert scaled(folder, {"normalize_activations": asked})[2] == 1


def test_tokens_of_the_mistral_release_are_normalised(tmp_path: Path) -> None:
    folder = tmp_path / "Mistral-7B-Residual-Stream-SAEs" / "mistral_7b_layer_8"
    assert scaled(folder, {})[0].cfg.norm == "constant_norm"


def test_whitening_without_its_matrices_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "saelens_v6_whitening_checkpoint", tmp_path, dirs_exist_ok=True)
    (tmp_path / "activation_whitening.safetensors").unlink()
    with pytest.raises(FormatError, match=r"covariance_whitening is not folded in, needs activation_whitening"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("fixture", "config", "message"),
    [
        ("llamascopium_sae_topk", {"norm_activation": "batch-wise"}, r"'batch-wise', needs .*depends on its batch"),
        ("llamascopium_transcoder_topk", {"norm_activation": "token-wise"}, r"'token-wise', needs .*same token"),
        (
            "llamascopium_sae_topk",
            {"expansion_factor": 3.0},
            r"expansion_factor makes 96 features, the weights need 128",
        ),
        ("llamascopium_sae_topk", {"sae_type": "molt"}, r"sae_type is 'molt', needs 'sae'"),
        ("llamascopium_lorsa_topk", {"act_fn": "batchtopk"}, r"act_fn is 'batchtopk', needs relu, jumprelu or topk"),
        ("llamascopium_lorsa_topk", {"rotary_scale": 2}, r"rotary_scale is 2, needs 1"),
        ("llamascopium_lorsa_topk", {"n_qk_heads": 6}, r"n_qk_heads is 6, the weights have 4"),
        ("llamascopium_lorsa_topk", {"positional_embedding_type": "alibi"}, r"is 'alibi', needs 'rotary' or 'none'"),
        ("saelens_v6_matching_pursuit", {"max_iterations": 0}, r"read as 'saelens': .*greater than or equal to 1"),
        ("saelens_v6_matching_pursuit", {"residual_threshold": "x"}, r"residual_threshold is 'x', needs float"),
    ],
)
def test_variant_that_cannot_be_computed_says_why(
    fixture: str, config: dict[str, Any], message: str, changed: Changed
) -> None:
    with pytest.raises(FormatError, match=message):
        load_sae(changed(fixture, config))


def test_sparse_attention_longer_than_its_rotation_tables_is_refused() -> None:
    sae = load_sae(FIXTURES / "llamascopium_lorsa_topk")
    with pytest.raises(ValueError, match=r"17 tokens, needs at most 16"):
        sae.encode(draw(17, 12))


def test_sparse_attention_does_not_look_ahead() -> None:
    sae, x = load_sae(FIXTURES / "llamascopium_lorsa_topk"), draw(9, 12)
    assert isinstance(sae, LorsaDictionary)
    assert close(sae.encode(x)[:5], sae.encode(x[:5]))
    assert not close(sae.encode(x)[5:], sae.encode(x[5:]))


def test_unrotated_sparse_attention_sees_a_set(changed: Changed) -> None:
    tables = {"rotary_cos": None, "rotary_sin": None}
    sae = load_sae(changed("llamascopium_lorsa_topk", {"positional_embedding_type": "none"}, tables))
    x = draw(6, 12)
    assert close(sae.encode(x)[-1], sae.encode(torch.cat([x[:5].flip(0), x[5:]]))[-1])


def test_matching_pursuit_takes_the_best_row_again_and_again() -> None:
    rows = torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    spec = MatchingPursuit(residual_threshold=0.0, max_iterations=3, stop_on_duplicate_support=False)
    # The first row is of norm 1/2: each step takes a quarter of what is left.
    assert pursue(spec, torch.tensor([[4.0, 0.5]]), rows).tolist() == [[2.0 + 1.5 + 1.125, 0.0]]
    once = spec.model_copy(update={"stop_on_duplicate_support": True})
    assert pursue(once, torch.tensor([[4.0, 0.5]]), rows).tolist() == [[2.0 + 1.5, 0.0]]
    early = spec.model_copy(update={"residual_threshold": 3.2})
    assert pursue(early, torch.tensor([[4.0, 0.5]]), rows).tolist() == [[2.0, 0.0]]
    assert pursue(spec, torch.tensor([[-4.0, -0.5]]), rows).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "fixture", ["saelens_v6_matching_pursuit", "llamascopium_lorsa_qk_norm_jumprelu", "llamascopium_clt_batchtopk"]
)
def test_variant_saved_by_saekit_is_loaded_again(fixture: str, tmp_path: Path) -> None:
    sae = load_sae(FIXTURES / fixture)
    sae.save(tmp_path)
    again, x = load_sae(tmp_path), draw(7, *((3,) if isinstance(sae, MultiLayerDictionary) else ()), sae.d_in)
    assert again.cfg == sae.cfg
    assert torch.equal(again.encode(x), sae.encode(x))


def test_matching_pursuit_is_exported_to_saelens(tmp_path: Path) -> None:
    sae, x = load_sae(FIXTURES / "saelens_v6_matching_pursuit"), draw(30, 16)
    save_sae(sae, tmp_path, format="saelens")
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_dec", "b_dec"}
    assert torch.equal(load_sae(tmp_path).encode(x), sae.encode(x))


def test_glu_of_old_llama_scope_multiplies_the_pre_activations(changed: Changed) -> None:
    glu = {"encoder_glu.weight": draw(128, 32), "encoder_glu.bias": draw(128)}
    folder = changed("llamascope_res", {"use_glu_encoder": True}, glu)
    (file,) = folder.rglob("final.safetensors")
    stored = {key: value.float() for key, value in load_file(file).items()}
    save_file(stored, file)
    x, scale = draw(9, 32), math.sqrt(32) / 3
    gate = torch.sigmoid(scale * x @ stored["encoder_glu.weight"].T + stored["encoder_glu.bias"])
    p = (scale * x @ stored["encoder.weight"].T + stored["encoder.bias"]) * gate
    q = p * stored["decoder.weight"].norm(dim=0) / scale
    assert close(load_sae(folder).encode(x), torch.where(q > 0.35, q, 0.0))


def test_llamascopiums_own_pickle_is_read(tmp_path: Path) -> None:
    fixture = FIXTURES / "llamascopium_sae_jumprelu"
    shutil.copy(fixture / "config.json", tmp_path)
    content = {"sae": load_file(fixture / "sae_weights.safetensors"), "version": "2.0.0"}
    torch.save(content, tmp_path / "sae_weights.pt")
    sae, x = load_sae(tmp_path), draw(9, 32)
    assert torch.equal(sae.encode(x), load_sae(fixture).encode(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sae_weights.dcp/__0_0.distcp",
            r"'sae_weights\.dcp' is a checkpoint of torch\.distributed, which is a pickle",
        ),
        ("sae.pkl.gz", r"'sae\.pkl\.gz' is a raw pickle, which runs what it names"),
    ],
)
def test_file_that_is_never_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize("fixture", ["dictlearn_standard", "dictlearn_gated"])
def test_old_run_whose_config_names_no_class_is_known_by_its_tensors(fixture: str, changed: Changed) -> None:
    plain, folder = load_sae(FIXTURES / fixture), changed(fixture)
    (path,) = folder.rglob("config.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["trainer"]["dict_class"]
    path.write_text(json.dumps(values), encoding="utf-8")
    sae, x = load_sae(folder), draw(9, plain.d_in)
    assert torch.equal(sae.encode(x), plain.encode(x))


@pytest.mark.parametrize("fixture", ["gemmascope2_clt_affine", "gemmascope2_crosscoder"])
def test_layers_of_gemma_scope_2_without_config_are_known_by_their_path(
    fixture: str, changed: Changed, tmp_path: Path
) -> None:
    folder = changed(fixture)
    named = load_sae(folder)
    next(folder.rglob("config.json")).unlink()
    home = tmp_path / "gemma-scope-2-1b-pt"
    folder.rename(home)
    kind = "clt" if "clt" in fixture else "crosscoder"
    (dictionary,) = (home / kind).iterdir()
    sae = load_sae(dictionary)
    assert sae.hook_point == named.hook_point
    assert sae.cfg == named.cfg
