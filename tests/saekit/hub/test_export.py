"""What is written for other libraries computes the same, read back by the readers that agree with those libraries."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.errors import ConfigError
from saekit.hub import load_sae, save_sae
from saekit.hub.export import as_dictionary
from saekit.sae import (
    SAE,
    BatchTopKConfig,
    BatchTopKSAE,
    Dictionary,
    GatedConfig,
    GatedSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    MatryoshkaTopKConfig,
    MatryoshkaTopKSAE,
    ReLUConfig,
    ReLUSAE,
    TopKConfig,
    TopKSAE,
    Transcoder,
    TranscoderConfig,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
TOLERANCE = 2e-5


def trained(kind: str) -> SAE:
    """An SAE of ours, all its numbers different from zero and one, at a place in a model."""
    classes: dict[str, Callable[[], SAE]] = {
        "topk": lambda: TopKSAE(TopKConfig(d_in=8, d_sae=24, k=3), hook_point="model.layers.3"),
        "batchtopk": lambda: BatchTopKSAE(BatchTopKConfig(d_in=8, d_sae=24, k=3), hook_point="model.layers.3"),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUConfig(d_in=8, d_sae=24), hook_point="model.layers.3"),
        "relu": lambda: ReLUSAE(ReLUConfig(d_in=8, d_sae=24), hook_point="model.layers.3"),
        "gated": lambda: GatedSAE(GatedConfig(d_in=8, d_sae=24), hook_point="model.layers.3"),
        "matryoshka": lambda: MatryoshkaTopKSAE(
            MatryoshkaTopKConfig(d_in=8, d_sae=24, k=3), hook_point="model.layers.3"
        ),
        "uncentred": lambda: JumpReLUSAE(
            JumpReLUConfig(d_in=8, d_sae=24, apply_b_dec_to_input=False), hook_point="model.layers.3"
        ),
    }
    sae = classes[kind]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return sae


def assert_same(ours: SAE, theirs: SAE) -> None:
    x = torch.randn(40, ours.d_in, generator=torch.Generator().manual_seed(1))
    assert (ours.encode(x) - theirs.encode(x)).abs().max() <= TOLERANCE
    assert (_x_hat(ours, x) - _x_hat(theirs, x)).abs().max() <= TOLERANCE


def _x_hat(sae: SAE, x: Tensor) -> Tensor:
    return sae(x).x_hat.detach()


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated", "uncentred"])
@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "saekit"])
def test_trained_sae_round_trips(kind: str, format: str, tmp_path: Path) -> None:
    sae = trained(kind)
    if format == "sparsify" and kind not in {"topk", "matryoshka"}:
        with pytest.raises(
            ConfigError, match=r"sparsify cannot express activation .*; it has top-k after relu, and groupmax"
        ):
            save_sae(sae, tmp_path, format=format)
        assert not list(tmp_path.iterdir())
        return
    save_sae(sae, tmp_path, format=format)
    again = load_sae(tmp_path)
    assert_same(sae, again)
    if format in {"saelens", "saekit"}:
        assert again.hook_point == "model.layers.3"


def test_trained_skip_transcoder_round_trips_where_it_can_be_expressed(tmp_path: Path) -> None:
    config = TranscoderConfig(d_in=8, d_out=8, d_sae=24, k=3, has_skip=True)
    sae = Transcoder(config, hook_point="model.layers.3.mlp:input", source={"target_hook_point": "model.layers.3.mlp"})
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    save_sae(sae, tmp_path / "layers.3.mlp", format="sparsify")
    assert_same(sae, load_sae(tmp_path / "layers.3.mlp"))
    assert as_dictionary(sae).hook_point_out == "model.layers.3.mlp"
    for format in ("saelens", "dictionary_learning"):
        with pytest.raises(ConfigError, match=f"export: {format} cannot express"):
            save_sae(sae, tmp_path / format, format=format)


@pytest.mark.parametrize(
    ("fixture", "formats"),
    [
        ("saelens_v5_gated", {"saelens", "dictionary_learning"}),
        ("saelens_v6_abstopk", {"saelens"}),
        ("saelens_v6_jumprelu_skip_transcoder", {"saelens"}),
        ("saelens_v6_transcoder", {"saelens"}),
        ("saelens_v6_standard_layer_norm", {"saelens"}),
        ("saelens_v6_standard_constant_norm_rescale", {"saelens"}),
        ("saelens_v5_tanh_relu", set()),
        ("sparsify_topk", {"saelens", "sparsify", "dictionary_learning"}),
        ("sparsify_groupmax", {"sparsify"}),
        ("sparsify_skip_transcode", {"sparsify"}),
        ("sparsify_transcode", {"sparsify"}),
        ("goodfire_llama31_8b", {"saelens", "dictionary_learning"}),
        ("gemmascope2_transcoder", {"saelens"}),
        ("llamascope_res", {"saelens", "dictionary_learning"}),
        ("llamascopium_sae_topk", set()),
        ("qwen_scope", set()),
        ("openai_v5_topk", {"saelens"}),
    ],
)
def test_released_dictionary_round_trips_or_is_refused(fixture: str, formats: set[str], tmp_path: Path) -> None:
    sae = load_sae(FIXTURES / fixture)
    for format in ("saelens", "sparsify", "dictionary_learning"):
        if format in formats:
            save_sae(sae, tmp_path / format, format=format)
            again = load_sae(tmp_path / format)
            assert_same(sae, again)
            assert again.source["format"] == format
        else:
            with pytest.raises(ConfigError, match=f"export: {format} cannot express .*, needs a dictionary without it"):
                save_sae(sae, tmp_path / format, format=format)
            assert not (tmp_path / format).exists()


def test_export_leaves_the_dictionary_as_it_was(tmp_path: Path) -> None:
    sae = load_sae(FIXTURES / "saelens_v5_gated")
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    save_sae(sae, tmp_path, format="dictionary_learning")
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_saelens_export_of_a_trained_sae_names_its_model(tmp_path: Path) -> None:
    source = {"model": "google/gemma-2-2b"}
    save_sae(TopKSAE(TopKConfig(d_in=8, d_sae=24, k=3), source=source), tmp_path, format="saelens")
    metadata = json.loads((tmp_path / "cfg.json").read_text(encoding="utf-8"))["metadata"]
    assert metadata["model_name"] == "google/gemma-2-2b"


def test_saelens_export_says_where_it_reads(tmp_path: Path) -> None:
    save_sae(load_sae(FIXTURES / "gemmascope2_transcoder"), tmp_path / "a", format="saelens")
    metadata = json.loads((tmp_path / "a" / "cfg.json").read_text(encoding="utf-8"))["metadata"]
    assert metadata["hook_name_out"] == "blocks.13.hook_mlp_out"
    assert metadata["hf_hook_name"] == "model.layers.13.pre_feedforward_layernorm.output"
    assert metadata["model_name"] == "google/gemma-3-1b-pt"
    assert metadata["sae_lens_version"] == "6.0.0"
    save_sae(load_sae(FIXTURES / "dunefsky_transcoder_pt_pickle"), tmp_path / "b", format="saelens")
    again = load_sae(tmp_path / "b")
    assert isinstance(again, Dictionary)
    assert again.cfg.site is not None
    assert (str(again.cfg.site), again.cfg.site.transform) == ("transformer.h.5.ln_2", "without_gain")


@pytest.mark.parametrize("fixture", ["gemmascope2_clt_affine", "temporal_hub"])
def test_several_layers_and_sequences_have_no_other_format(fixture: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a dictionary of one site and one token"):
        save_sae(load_sae(FIXTURES / fixture), tmp_path, format="saelens")


def test_dictionary_learning_export_says_where_it_reads(tmp_path: Path) -> None:
    cfg = TopKConfig(d_in=8, d_sae=24, k=3)
    for point, source, expected in (
        ("model.layers.3", {"model": "google/gemma-2-2b"}, "model.layers.3"),
        ("model.layers.3:input", {"model": "google/gemma-2-2b"}, "None"),
        ("model.layers.3", {}, "None"),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        save_sae(TopKSAE(cfg, hook_point=point, source=source), folder, format="dictionary_learning")
        assert str(load_sae(folder).hook_point) == expected
    trainer = json.loads((tmp_path / "0" / "config.json").read_text(encoding="utf-8"))["trainer"]
    assert (trainer["layer"], trainer["lm_name"]) == (3, "google/gemma-2-2b")


def test_unknown_target_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"format 'npz', needs saekit, saelens, sparsify, dictionary_learning, circuit-tracer"
    ):
        save_sae(trained("topk"), tmp_path, format="npz")
