"""The ten places where readers of these formats go wrong, each as the release defines it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub import load_sae
from saekit.sae.activation import LayerTopK
from saekit.sae.dictionary import Dictionary
from saekit.sae.multilayer import MultiLayerDictionary

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
Changed = Callable[..., Path]


def x_of(name: str) -> Tensor:
    return torch.from_numpy(np.load(FIXTURES / name / "inputs.npy", allow_pickle=False))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-4)


def test_trap_1_sparsify_is_centred_has_its_width_from_the_weights_and_its_hook_from_its_folder(tmp_path: Path) -> None:
    tensors, x = load_file(FIXTURES / "sparsify_topk/layers.5/sae.safetensors"), x_of("sparsify_topk")
    sae = load_sae(FIXTURES / "sparsify_topk")
    pre_acts = (x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    top = pre_acts.relu().topk(8)
    expected = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values)
    assert close(sae.encode(x), expected)
    assert close(sae(x).x_hat, expected @ tensors["W_dec"] + tensors["b_dec"])
    places = {
        "sae-Llama-3.2-1B/layers.5.mlp": "model.layers.5.mlp",
        "sae-pythia-70m/layers.5": "gpt_neox.layers.5",
        "sae-pythia-70m/layers.3.attention": "gpt_neox.layers.3.attention",
        "sae-llama-3-8b/layer_5": "model.layers.5",
        "sae-gpt2/h.5.attn": "transformer.h.5.attn",
        "sae-llama-3-8b/model.layers.18.mlp/seed1": "model.layers.18.mlp",
        "unnamed/layers.5": "layers.5",
    }
    for place, hook_point in places.items():
        folder = tmp_path / place
        shutil.copytree(FIXTURES / "sparsify_topk" / "layers.5", folder)
        assert load_sae(folder).hook_point == hook_point, place


def test_trap_2_llama_scope_compares_folded_activations_with_its_threshold() -> None:
    folder, x = FIXTURES / "llamascope_res", x_of("llamascope_res")
    tensors = load_file(folder / "Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors")
    unfolded = x * (math.sqrt(32) / 3) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    acts = load_sae(folder).encode(x)
    norms = tensors["decoder.weight"].norm(dim=0)
    assert close(
        acts, torch.where(unfolded * norms / (math.sqrt(32) / 3) > 0.35, unfolded * norms / (math.sqrt(32) / 3), 0.0)
    )
    assert (acts > 0).sum() != (unfolded > 0.35 * math.sqrt(32) / 3).sum()


def test_trap_3_skip_transcoder_without_the_transcode_key_subtracts_b_dec_from_its_input(changed: Changed) -> None:
    x = x_of("sparsify_skip_transcode")
    sae = load_sae(changed("sparsify_skip_transcode", config={"transcode": None}))
    tensors = load_file(FIXTURES / "sparsify_skip_transcode/layers.5.mlp/sae.safetensors")
    pre_acts = (x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    top = pre_acts.relu().topk(8)
    acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values)
    assert close(sae.encode(x), acts)
    assert close(sae(x).x_hat, acts @ tensors["W_dec"] + tensors["b_dec"] + x @ tensors["W_skip"].T)
    assert not close(sae.encode(x), load_sae(FIXTURES / "sparsify_skip_transcode").encode(x))


def test_trap_4_gemma_scope_transcoders_read_without_gain_the_first_and_with_it_the_second(tmp_path: Path) -> None:
    first = tmp_path / "gemma-scope-2b-pt-transcoders"
    shutil.copytree(FIXTURES / "gemmascope_transcoder", first)
    old, new = load_sae(first), load_sae(FIXTURES / "gemmascope2_transcoder")
    assert isinstance(old, Dictionary)
    assert isinstance(new, Dictionary)
    assert old.cfg.site is not None
    assert old.cfg.site.model_dump() == {
        "path": "model.layers.0.pre_feedforward_layernorm",
        "side": "output",
        "transform": "without_gain_plus_one",
    }
    assert old.hook_point_out == "model.layers.0.post_feedforward_layernorm"
    assert new.cfg.site is not None
    assert (new.hook_point, new.cfg.site.transform) == ("model.layers.13.pre_feedforward_layernorm", "none")
    assert new.hook_point_out == "model.layers.13.post_feedforward_layernorm"


def test_trap_5_skip_connections_are_stored_both_ways_round(changed: Changed) -> None:
    skip = torch.randn(32, 32)
    x = x_of("gemmascope2_transcoder")
    plain = load_sae(FIXTURES / "gemmascope2_transcoder")(x).x_hat
    config = {"affine_connection": True}
    affine = load_sae(changed("gemmascope2_transcoder", config=config, tensors={"affine_skip_connection": skip}))
    assert close(affine(x).x_hat, plain + x @ skip)
    one = FIXTURES / "circuittracer_plt_relu" / "layer_0.safetensors"
    x = x_of("circuittracer_plt_relu")[0]
    folder = changed("circuittracer_plt_relu", tensors={"W_skip": skip})
    assert close(load_sae(folder / "layer_0.safetensors")(x).x_hat, load_sae(one)(x).x_hat + x @ skip.T)


@pytest.mark.parametrize(
    ("fixture", "tensor", "negative"),
    [
        ("saelens_v6_jumprelu", "threshold", "zero"),
        ("gemmascope2_resid", "threshold", "zero"),
        ("circuittracer_plt_jumprelu", "activation_function.threshold", "keep"),
    ],
)
def test_trap_6_thresholds_below_zero(fixture: str, tensor: str, negative: str, changed: Changed) -> None:
    folder = changed(fixture, tensors={tensor: torch.full((128,), -0.5)})
    folder = folder / "layer_0.safetensors" if fixture.startswith("circuit") else folder
    sae = load_sae(folder)
    assert isinstance(sae, Dictionary)
    x = x_of(fixture).reshape(-1, 32)
    pre_acts = sae.pre_acts(x)
    kept = torch.where(pre_acts > -0.5, pre_acts, 0.0)
    expected = kept.relu() if negative == "zero" else kept
    assert torch.equal(sae.encode(x), expected)
    assert bool((sae.encode(x) < 0).any()) == (negative == "keep")
    values, indices = sae.encode_sparse(x)
    assert close(torch.zeros_like(expected).scatter_add(1, indices, values), expected)


def test_trap_6_untrained_threshold_of_batch_topk_is_relu(changed: Changed) -> None:
    sae = load_sae(changed("dictlearn_batch_topk", tensors={"threshold": torch.tensor(-1.0)}))
    x = x_of("dictlearn_batch_topk")
    assert torch.equal(sae.encode(x), sae.pre_acts(x).relu())


def test_trap_6_thresholds_are_strict(changed: Changed) -> None:
    zeros = {
        "W_enc": torch.zeros(32, 128),
        "b_enc": torch.ones(128),
        "threshold": torch.ones(128),
        "b_dec": torch.zeros(32),
    }
    sae = load_sae(changed("saelens_v6_jumprelu", tensors=zeros))
    assert sae.encode(torch.zeros(1, 32)).abs().sum() == 0


def test_trap_7_the_meanings_of_topk_are_kept_apart(changed: Changed) -> None:
    """With fewer than k positive pre-activations: relu leaves fewer, the card of Qwen-Scope keeps the negative ones."""
    specs = {
        "sparsify_topk": ("value", "zero"),
        "saelens_v6_topk": ("value", "zero"),
        "openai_v5_topk": ("value", "zero"),
        "dictlearn_topk": ("value", "zero"),
        "qwen_scope": ("value", "keep"),
        "circuittracer_plt_topk_main": ("value", "keep"),
        "saelens_v6_abstopk": ("magnitude", "keep"),
    }
    for fixture, spec in specs.items():
        activation = load_sae(FIXTURES / fixture).cfg.model_dump()["activation"]
        assert (activation["by"], activation["negative"]) == spec, fixture
    signed = load_sae(changed("sparsify_v2024_unsigned", config={"signed": True})).cfg.model_dump()["activation"]
    assert (signed["by"], signed["negative"]) == ("magnitude", "keep")
    few = load_sae(FIXTURES / "qwen_scope_few_positive").encode(x_of("qwen_scope_few_positive"))
    assert bool((few < 0).any())
    assert bool(((few != 0).sum(dim=1) == 8).all())


def test_trap_7_selection_by_decoder_norm_groups_and_joint_topk() -> None:
    by_norm = load_sae(FIXTURES / "llamascopium_sae_topk")
    assert isinstance(by_norm, Dictionary)
    x = x_of("llamascopium_sae_topk")
    plain = by_norm.with_activation(by_norm.cfg.activation)
    assert plain.score_scale is not None
    plain.score_scale = None
    assert not close(by_norm.encode(x), plain.encode(x))
    assert load_sae(FIXTURES / "sparsify_groupmax").cfg.model_dump()["activation"] == {"kind": "groupmax", "k": 8}
    joint = load_sae(FIXTURES / "bytedance_topk_clt")
    assert isinstance(joint, MultiLayerDictionary)
    assert joint.cfg.activation == LayerTopK(k=2)
    counts = (joint.encode(x_of("bytedance_topk_clt")) > 0).sum(dim=2)
    assert bool((counts.sum(dim=1) == 6).all())
    assert bool((counts != 2).any())


def test_trap_8_old_saelens_keeps_tanh_and_the_finetuned_scale(changed: Changed) -> None:
    x = x_of("saelens_v5_tanh_relu")
    acts = load_sae(FIXTURES / "saelens_v5_tanh_relu").encode(x)
    assert 0 < acts.max() < 1
    scale = torch.rand(128) + 0.5
    sae = load_sae(changed("saelens_v1_standard", tensors={"scaling_factor": scale}))
    plain, x = load_sae(FIXTURES / "saelens_v1_standard"), x_of("saelens_v1_standard")
    assert torch.equal(sae.encode(x), plain.encode(x))
    assert close(sae(x).x_hat, (plain.encode(x) * scale) @ plain.W_dec + plain.b_dec)


def test_trap_8_scale_that_the_config_denies_is_refused(changed: Changed) -> None:
    folder = changed("saelens_v5_standard", tensors={"scaling_factor": torch.full((128,), 2.0)})
    with pytest.raises(FormatError, match="finetuning_scaling_factor is false, scaling_factor in the weights is not 1"):
        load_sae(folder)


def test_trap_8_scale_that_is_in_no_file_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    load_sae(FIXTURES / "saelens_v6_standard_expected_average_only_in")
    assert "the files hold no scale; the weights are taken as they are" in caplog.text


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
def test_trap_9_normalised_openmoss_with_glu_is_folded_exactly(act_fn: str, changed: Changed) -> None:
    fixture = f"llamascopium_sae_{act_fn}"
    generator = torch.Generator().manual_seed(0)
    glu = {"W_E_glu": torch.randn(32, 128, generator=generator), "b_E_glu": torch.randn(128, generator=generator)}
    folder = changed(fixture, config={"use_glu_encoder": True}, tensors=glu)
    sae, x = load_sae(folder), x_of(fixture)
    stored = {key: value.double() for key, value in load_file(folder / "sae_weights.safetensors").items()}
    scale = math.sqrt(32) / 3
    u = x.double() * scale
    pre_acts = (u @ stored["W_E"] + stored["b_E"]) * torch.sigmoid(u @ stored["W_E_glu"] + stored["b_E_glu"])
    scores = pre_acts * stored["W_D"].norm(dim=1)
    if act_fn == "jumprelu":
        kept = scores > stored["activation_function.log_jumprelu_threshold"].exp()
    else:
        kept = torch.zeros_like(scores).scatter(1, scores.relu().topk(8).indices, 1.0) > 0
    acts = torch.where(kept, pre_acts, 0.0)
    assert close(sae.encode(x).double(), acts)
    assert close(sae(x).x_hat.double(), (acts @ stored["W_D"] + stored["b_D"]) / scale)


def test_trap_10_pickled_config_objects_are_read_as_attributes_only() -> None:
    sae = load_sae(FIXTURES / "saelens_v1_legacy_pt_pickle")
    pickled = sae.source["metadata"]
    assert isinstance(pickled, dict)
    assert pickled["pickled"]["cfg"]["d_in"] == 32
    json.dumps(sae.source)
    transcoder = load_sae(FIXTURES / "dunefsky_transcoder_pt_pickle")
    assert isinstance(transcoder, Dictionary)
    assert transcoder.cfg.site is not None
    assert (transcoder.hook_point, transcoder.cfg.site.transform) == ("transformer.h.5.ln_2", "without_gain")
    assert transcoder.hook_point_out == "transformer.h.5.mlp"
