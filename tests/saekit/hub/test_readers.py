"""What the fixtures do not hold: further classes, generations and names of each format, against their formulas."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub import load_sae
from saekit.sae.activation import JumpReLU, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.dictionary import Dictionary
from saekit.sae.multilayer import MultiLayerDictionary

D, F = 6, 20
Changed = Callable[..., Path]


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(*shape, generator=generator)


def agrees(sae: SAE, x: Tensor, acts: Tensor, x_hat: Tensor) -> None:
    assert (sae.encode(x) - acts).abs().max() <= 1e-5
    assert (sae(x).x_hat - x_hat).abs().max() <= 1e-5


def dictionary_learning(folder: Path, name: str, tensors: dict[str, Tensor], **trainer: object) -> SAE:
    torch.save(tensors, folder / "ae.pt")
    config = {"trainer": {"dict_class": name, "lm_name": "EleutherAI/pythia-70m", **trainer}, "buffer": {}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_sae(folder)


def as_used() -> dict[str, Tensor]:
    return {"W_enc": draw(D, F), "b_enc": draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}


def test_jumprelu_class_of_dictionary_learning_does_not_subtract_b_dec(tmp_path: Path) -> None:
    t = as_used() | {"threshold": draw(F).abs() * 0.3}
    sae = dictionary_learning(tmp_path, "JumpReluAutoEncoder", t, submodule_name="resid_post_layer_3")
    x = draw(9, D)
    p = x @ t["W_enc"] + t["b_enc"]
    acts = (p * (p > t["threshold"])).relu()
    agrees(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])
    assert sae.hook_point == "gpt_neox.layers.3"


def test_matryoshka_class_of_dictionary_learning_has_one_threshold(tmp_path: Path) -> None:
    t = as_used() | {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    sae = dictionary_learning(tmp_path, "MatryoshkaBatchTopKSAE", t | {"group_sizes": torch.tensor([5, 15])}, k=4)
    x = draw(9, D)
    h = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    acts = h * (h > 0.7)
    agrees(sae, x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_topk_class_of_dictionary_learning_does_not_read_its_threshold(changed: Changed) -> None:
    # Infinite once a token of training had fewer than k positive entries; another rule would use it.
    sae, x = load_sae(changed("dictlearn_topk", tensors={"threshold": torch.tensor(math.inf)})), draw(4, 32)
    assert isinstance(sae, Dictionary)
    assert sae.threshold is None
    assert int((sae.encode(x) > 0).sum()) > 0


def test_compiled_models_prefix_is_dropped(tmp_path: Path) -> None:
    t = as_used() | {"threshold": draw(F).abs()}
    sae = dictionary_learning(tmp_path, "JumpReluAutoEncoder", {f"_orig_mod.{key}": value for key, value in t.items()})
    assert torch.equal(sae.W_dec, t["W_dec"])


def test_openai_relu_version_does_not_normalise(tmp_path: Path) -> None:
    t = {"pre_bias": draw(D), "latent_bias": draw(F), "encoder.weight": draw(F, D), "decoder.weight": draw(D, F)}
    folder = tmp_path / "gpt2-small/resid_delta_mlp_v4/autoencoders"
    folder.mkdir(parents=True)
    torch.save({**t, "activation": "ReLU", "activation_state_dict": {}}, folder / "5.pt")
    sae, x = load_sae(folder / "5.pt"), draw(9, D)
    acts = ((x - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]).relu()
    agrees(sae, x, acts, acts @ t["decoder.weight"].T + t["pre_bias"])
    assert sae.hook_point == "transformer.h.5.mlp"


def test_goodfire_file_with_k_in_its_name_is_topk(tmp_path: Path) -> None:
    t = {
        "encoder_linear.weight": draw(F, D),
        "encoder_linear.bias": draw(F),
        "decoder.weight": draw(D, F),
        "decoder.bias": draw(D),
    }
    torch.save(t, tmp_path / "topk_sae_l15_exp16_k3.pt")
    sae = load_sae(tmp_path)
    assert isinstance(sae, Dictionary)
    assert sae.cfg.activation == TopK(k=3)
    torch.save(t, tmp_path / "sae.pt")
    with pytest.raises(FormatError, match=r"has decoder\.weight, the file's name says relu"):
        load_sae(tmp_path / "sae.pt")


def test_saelens_checkpoint_with_log_threshold_is_exponentiated(changed: Changed) -> None:
    log = {"threshold": None, "log_threshold": draw(128)}
    folder = changed("saelens_v6_jumprelu_transcoder", tensors=log)
    sae = load_sae(folder)
    assert isinstance(sae, Dictionary)
    assert sae.threshold is not None
    assert torch.equal(sae.threshold, draw(128).exp())


def test_saelens_config_without_apply_b_dec_to_input_subtracts_it(changed: Changed) -> None:
    folder = changed("saelens_v3_standard", {"apply_b_dec_to_input": None})
    t, x = load_file(folder / "sae_weights.safetensors"), draw(9, 32)
    acts = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    agrees(load_sae(folder), x, acts, acts @ t["W_dec"] + t["b_dec"])


def test_saelens_transcoder_does_not_undo_its_inputs_norm(changed: Changed) -> None:
    plain = load_sae(changed("saelens_v6_transcoder"))
    x = draw(9, 32)
    u = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    cfg = Path(str(plain.source["ref"])) / "cfg.json"
    values = json.loads(cfg.read_text(encoding="utf-8")) | {"normalize_activations": "layer_norm"}
    cfg.write_text(json.dumps(values), encoding="utf-8")
    normed = load_sae(cfg.parent)
    agrees(normed, x, plain.encode(u), plain(u).x_hat)


def test_rescaled_topk_multiplies_by_the_decoder_norm(changed: Changed) -> None:
    folder = changed("saelens_v6_topk_norescale", {"rescale_acts_by_decoder_norm": True})
    t, x = load_file(folder / "sae_weights.safetensors"), draw(9, 32)
    norms = t["W_dec"].norm(dim=1)
    p = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    top = p.topk(8)
    acts = torch.zeros_like(p).scatter(1, top.indices, top.values).relu()
    agrees(load_sae(folder), x, acts, acts @ (t["W_dec"] / norms[:, None]) + t["b_dec"])


def test_gemma_scope_2_without_config_is_known_by_its_path(changed: Changed, tmp_path: Path) -> None:
    folder = changed("gemmascope2_transcoder")
    next(folder.rglob("config.json")).unlink()
    home = tmp_path / "gemma-scope-2-4b-pt"
    folder.rename(home)
    sae = load_sae(home)
    assert sae.hook_point == "model.language_model.layers.13.pre_feedforward_layernorm"


def test_compact_cross_layer_decoders_reach_later_layers_only(changed: Changed) -> None:
    dense = changed("gemmascope2_clt_affine")
    for path in dense.rglob("params_layer_*.safetensors"):
        layer, tensors = int(path.stem[-1]), load_file(path)
        causal = tensors["w_dec"].clone()
        causal[:, :layer] = 0
        save_file({**tensors, "w_dec": causal}, path)
    full, x = load_sae(dense), draw(5, 3, 16)
    expected = full(x).x_hat
    for path in dense.rglob("params_layer_*.safetensors"):
        layer, tensors = int(path.stem[-1]), load_file(path)
        save_file({**tensors, "w_dec": tensors["w_dec"][:, layer:].contiguous()}, path)
    compact = load_sae(dense)
    assert isinstance(compact, MultiLayerDictionary)
    assert compact.cfg.targets == ((0, 3), (1, 2), (2, 1))
    assert (compact(x).x_hat - expected).abs().max() <= 1e-5


def test_llama_scope_may_subtract_its_decoder_bias_in_normalised_units(changed: Changed) -> None:
    folder = changed("llamascope_transcoder", {"apply_decoder_bias_to_pre_encoder": True})
    t = load_file(next(folder.rglob("final.safetensors")))
    x, s_in, s_out = draw(9, 32), math.sqrt(32) / 6, math.sqrt(32) / 1.5
    norms = t["decoder.weight"].norm(dim=0)
    q = ((s_in * x - t["decoder.bias"]) @ t["encoder.weight"].T + t["encoder.bias"]) * norms / s_out
    acts = torch.where(q > 0.2, q, 0.0)
    agrees(load_sae(folder), x, acts, acts @ (t["decoder.weight"] / norms).T + t["decoder.bias"] / s_out)


def test_r1_distill_compares_by_decoder_norm_where_its_config_says_so(changed: Changed) -> None:
    folder = changed("llamascope_r1_distill", {"sparsity_include_decoder_norm": True})
    t = load_file(next(folder.rglob("sae_weights.safetensors")))
    x, scale = draw(9, 32), math.sqrt(32) / 3
    p = scale * x @ t["encoder.weight"].T + t["encoder.bias"]
    acts = torch.where(p * t["decoder.weight"].norm(dim=0) > t["log_jumprelu_threshold"].exp(), p, 0.0)
    agrees(load_sae(folder), x, acts, (acts @ t["decoder.weight"].T + t["decoder.bias"]) / scale)


def test_norms_that_nobody_set_are_not_read(changed: Changed) -> None:
    name = "dataset_average_activation_norm.blocks.6.hook_resid_post"
    folder = changed("llamascopium_sae_topk", {"norm_activation": "inference"}, {name: torch.tensor(float("nan"))})
    t = load_file(folder / "sae_weights.safetensors")
    sae = load_sae(folder)
    assert torch.equal(sae.W_enc, t["W_E"])
    assert torch.equal(sae.W_dec, t["W_D"])


def test_batch_topk_crosscoder_compares_by_the_sum_of_its_decoder_norms(changed: Changed) -> None:
    folder = changed("sof_crosscoder", tensors={"threshold": torch.tensor(9.0), "k": torch.tensor(5)})
    sae, x = load_sae(folder), draw(9, 2, 24)
    t = load_file(folder / "model.safetensors")
    a = (torch.einsum("nld,ldf->nf", x, t["encoder.weight"]) + t["encoder.bias"]).relu()
    acts = a * (a * t["decoder.weight"].norm(dim=2).sum(0) > 9)
    assert 0 < (acts > 0).sum() < (a > 0).sum()
    assert (sae.encode(x) - acts).abs().max() <= 1e-5


def test_cross_layer_thresholds_are_those_of_their_layer(changed: Changed) -> None:
    folder = changed("circuittracer_clt_relu")
    for layer in range(3):
        path = folder / f"W_enc_{layer}.safetensors"
        save_file({**load_file(path), f"threshold_{layer}": torch.full((48,), float(layer))}, path)
    sae, x = load_sae(folder), draw(5, 3, 16)
    assert isinstance(sae, MultiLayerDictionary)
    assert sae.cfg.activation == JumpReLU(negative="keep")
    p = sae.pre_acts(x)
    assert torch.equal(sae.encode(x), torch.where(p > torch.arange(3.0)[:, None], p, 0.0))


def test_untied_temporal_dictionary_has_an_encoder_of_its_own(changed: Changed) -> None:
    folder = changed("saelens_v6_temporal", {"tied_weights": False}, {"W_enc": draw(16, 64)})
    assert torch.equal(load_sae(folder).W_enc, draw(16, 64))


def test_temporal_relu_keeps_every_positive_code(changed: Changed) -> None:
    sae, x = load_sae(changed("saelens_v6_temporal", {"sae_diff_type": "relu"})), draw(2, 6, 16)
    assert torch.equal(sae.encode(x), sae.pre_acts(x).relu().view(2, 6, 64))
    assert torch.allclose(sae(x[0]).x_hat, sae(x).x_hat[0], atol=1e-6)


def test_decode_of_a_normalised_dictionary_needs_its_input(changed: Changed) -> None:
    sae, x = load_sae(changed("saelens_v6_standard_layer_norm")), draw(4, 32)
    assert isinstance(sae, Dictionary)
    with pytest.raises(ValueError, match=r"normalises each token \(layer_norm\), needs the input to undo it"):
        sae.decode(sae.encode(x).clone())
    assert torch.allclose(sae.decode(sae.encode(x), x), sae(x).x_hat, atol=1e-5)


def test_input_of_another_width_is_refused(changed: Changed) -> None:
    with pytest.raises(ValueError, match=r"x has shape \[4, 31\], needs \[\.\.\., 32\]"):
        load_sae(changed("goodfire_llama31_8b")).encode(draw(4, 31))
    with pytest.raises(ValueError, match=r"x has shape \[4, 16\], needs \[\.\.\., 3, 16\] \(layer, width\)"):
        load_sae(changed("circuittracer_clt_relu")).encode(draw(4, 16))


def test_relu_is_what_a_set_without_activation_has(changed: Changed) -> None:
    sae = load_sae(changed("mwhanna_qwen3_transcoder"))
    assert isinstance(sae, Dictionary)
    assert sae.cfg.activation == ReLU()
