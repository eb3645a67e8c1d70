"""circuit-tracer's folders: what is written computes the same, read back by the readers that agree with it; the rest is refused."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from saekit.errors import ConfigError
from saekit.hub import convert_sae, load_sae, load_saes, save_sae
from saekit.sae import SAE, Dictionary, DictionaryConfig, MultiLayerDictionary, Site
from saekit.sae.activation import JumpReLU, ReLU, TopK

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
TOLERANCE = 2e-5


def transcoder(layer: int = 0, **changes: object) -> Dictionary:
    """A jumprelu skip transcoder of one MLP, thresholds on both sides of 0."""
    generator = torch.Generator().manual_seed(layer)
    shapes = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,), "W_skip": (8, 8), "threshold": (24,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mlp = f"model.layers.{layer}.mlp"
    values: dict[str, object] = {
        "d_in": 8,
        "d_sae": 24,
        "d_out": 8,
        "activation": JumpReLU(),
        "site": Site(path=mlp, side="input"),
        "site_out": Site(path=mlp),
    }
    cfg = DictionaryConfig.model_validate(values | changes)
    return Dictionary(cfg, tensors, source={"model_name": "a/model"}).requires_grad_(False)


def assert_same(ours: SAE, theirs: SAE) -> None:
    shape = (30, ours.cfg.num_layers_in, ours.d_in) if isinstance(ours, MultiLayerDictionary) else (30, ours.d_in)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert (ours.encode(x) - theirs.encode(x)).abs().max() <= TOLERANCE
    assert (ours(x).x_hat - theirs(x).x_hat).abs().max() <= TOLERANCE


@pytest.mark.parametrize("negative", ["zero", "keep"])
def test_set_round_trips_layer_by_layer(negative: str, tmp_path: Path) -> None:
    saes = [transcoder(layer, activation=JumpReLU.model_validate({"negative": negative})) for layer in range(2)]
    for sae in saes:
        save_sae(sae, tmp_path, format="circuit-tracer")
    again = load_saes(tmp_path)
    assert list(again) == ["layer_0.safetensors", "layer_1.safetensors"]
    for sae, read in zip(saes, again.values(), strict=True):
        assert_same(sae, read)
        assert (read.hook_point, read.source["format"]) == (None, "transcoder_set")  # 'a/model' tells no architecture
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == {
        "model_name": "a/model",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "a/model",
    }
    assert {name: list(value.shape) for name, value in load_file(tmp_path / "layer_1.safetensors").items()} == {
        "W_enc": [24, 8],
        "W_dec": [24, 8],
        "b_enc": [24],
        "b_dec": [8],
        "W_skip": [8, 8],
        "activation_function.threshold": [24],
    }


@pytest.mark.parametrize("fixture", ["circuittracer_plt_jumprelu", "circuittracer_plt_relu"])
def test_released_set_is_converted_whole(fixture: str, tmp_path: Path) -> None:
    convert_sae(FIXTURES / fixture, tmp_path / "out", format="circuit-tracer")
    before, after = load_saes(FIXTURES / fixture), load_saes(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, sae in before.items():
        assert_same(sae, after[name])
        assert sae.hook_point == after[name].hook_point


@pytest.mark.parametrize("fixture", ["circuittracer_clt_relu", "llamascopium_clt_jumprelu"])
def test_cross_layer_transcoder_round_trips(fixture: str, tmp_path: Path) -> None:
    sae = load_sae(FIXTURES / fixture)
    convert_sae(FIXTURES / fixture, tmp_path / "out", format="circuit-tracer")
    again = load_sae(tmp_path / "out")
    assert_same(sae, again)
    assert again.source["format"] == "cross_layer"


def test_dense_decoders_are_cut_where_they_are_zero(tmp_path: Path) -> None:
    sae = load_sae(FIXTURES / "gemmascope2_clt_affine")
    assert isinstance(sae, MultiLayerDictionary)
    tensors = {name: value.detach().clone() for name, value in sae.named_parameters() if name != "W_skip"}
    dense = MultiLayerDictionary(sae.cfg, tensors, source=sae.source)
    if any(first < source for source, (first, _) in enumerate(sae.cfg.targets)):
        with torch.no_grad():
            for source, (first, _) in enumerate(sae.cfg.targets):
                dense.decoders[source][:, : source - first] = 0
    save_sae(dense, tmp_path, format="circuit-tracer")
    assert_same(dense, load_sae(tmp_path))
    with torch.no_grad():
        dense.decoders[2][:, 0] = 1
    with pytest.raises(ConfigError, match="features of layer 2 that write back to earlier layers"):
        save_sae(dense, tmp_path / "again", format="circuit-tracer")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"activation": TopK(k=3)}, "activation .*; its releases have relu and jumprelu"),
        ({"site_out": None, "W_skip": None}, "an SAE that writes where it reads; it replaces MLPs by transcoders"),
        ({"site": None}, "does not say where it reads; load it with hook_point"),
        ({"site": Site(path="model.layers.1.mlp", side="input")}, "reading layer 1 and writing layer 0"),
        ({"site": Site(path="transformer.h.0", transform="centered")}, "'transformer.h.0' after the step 'centered'"),
        ({"norm": "layer_norm"}, "norm 'layer_norm'"),
    ],
)
def test_what_it_cannot_express_is_refused(changes: dict[str, object], what: str, tmp_path: Path) -> None:
    sae = transcoder(**{key: value for key, value in changes.items() if key != "W_skip"})
    if "W_skip" in changes:
        sae.W_skip = None
    with pytest.raises(ConfigError, match=rf"circuit-tracer cannot express .*{what}"):
        save_sae(sae, tmp_path / "out", format="circuit-tracer")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fixture", "what"),
    [
        ("gemmascope2_clt_affine", "a cross-layer transcoder with W_skip"),
        ("gemmascope2_crosscoder", "sites .*; it has one kind, in layers 0 to the last"),
        ("bytedance_topk_clt", "score_scale"),
        ("sof_crosscoder", "features that read several layers"),
    ],
)
def test_several_layers_that_it_cannot_express_are_refused(fixture: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"circuit-tracer cannot express .*{what}"):
        save_sae(load_sae(FIXTURES / fixture), tmp_path / "out", format="circuit-tracer")
    assert not (tmp_path / "out").exists()


def test_layers_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    save_sae(transcoder(0), tmp_path / "a", format="circuit-tracer")
    other = transcoder(1, activation=ReLU())
    with pytest.raises(ConfigError, match=r"layer_1\.safetensors has .*, circuit-tracer needs the shapes of layer_0"):
        save_sae(other, tmp_path / "a", format="circuit-tracer")
    other = transcoder(1)
    other.source["model_name"] = "another/model"
    with pytest.raises(ConfigError, match=r"config\.yaml' says .*a/model.* this dictionary needs .*another/model"):
        save_sae(other, tmp_path / "a", format="circuit-tracer")


def test_set_with_a_gap_is_refused(tmp_path: Path) -> None:
    for layer in (0, 2):
        save_sae(transcoder(layer), tmp_path / "from" / str(layer))
    with pytest.raises(ConfigError, match=r"has layers \[0, 2\], circuit-tracer needs 0 to 2 without gaps"):
        convert_sae(tmp_path / "from", tmp_path / "to", format="circuit-tracer")
