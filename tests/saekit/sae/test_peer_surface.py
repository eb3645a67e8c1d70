"""What SAEBench reads of a dictionary and writes on its config, without SAEBench."""

import copy
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from saekit.errors import ConfigError
from saekit.hub import load_sae
from saekit.sae import JumpReLUConfig, JumpReLUSAE, TopKConfig, TopKSAE

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"


def trained(**options: object) -> TopKSAE:
    return TopKSAE(
        TopKConfig(d_in=8, d_sae=24, k=3), hook_point="model.layers.3", source={"model": "a/gemma-2-2b"}, **options
    )


@pytest.mark.parametrize(
    ("fixture", "hook_name", "hook_layer", "model"),
    [
        ("saelens_v6_standard", "blocks.5.hook_resid_pre", 5, "gpt2-small"),
        ("saelens_v1_standard", "blocks.5.hook_resid_pre", 5, "gpt2-small"),
        ("connor_attn", "blocks.5.attn.hook_z", 5, "gpt2"),
        ("gemmascope2_transcoder", "blocks.13.mlp.hook_in", 13, "google/gemma-3-1b-pt"),
        ("dictlearn_topk", "blocks.5.hook_resid_post", 5, "EleutherAI/pythia-70m-deduped"),
    ],
)
def test_released_dictionary_answers_to_the_names(fixture: str, hook_name: str, hook_layer: int, model: str) -> None:
    sae = load_sae(FIXTURES / fixture)
    cfg = sae.cfg
    assert (cfg.hook_name, cfg.hook_layer, cfg.d_in, cfg.d_sae) == (hook_name, hook_layer, 32, 128)
    assert str(cfg.model_name).split("/")[-1] == model.split("/")[-1]
    assert (cfg.dtype, cfg.device, cfg.normalize_activations) == ("float32", "cpu", "none")
    centered = {"center_writing_weights": True} if fixture == "saelens_v1_standard" else {}
    assert cfg.model_from_pretrained_kwargs == centered


def test_config_follows_the_dictionary() -> None:
    sae = trained()
    cfg = sae.cfg
    assert (cfg.hook_name, cfg.model_name) == ("blocks.3.hook_resid_post", "a/gemma-2-2b")
    sae.hook_point = "model.layers.4.mlp:input"
    assert cfg.hook_layer == 4
    assert sae.to(torch.bfloat16) is sae
    assert (sae.dtype, cfg.dtype) == (torch.bfloat16, "bfloat16")
    assert sae.device == torch.device("cpu")


def test_names_may_be_written_and_fields_may_not() -> None:
    sae, other = trained(), trained()
    sae.cfg.hook_layer = 7
    sae.cfg.metadata = sae.cfg
    assert sae.cfg.hook_layer == 7
    assert other.cfg.hook_layer == 3
    assert sae.cfg == other.cfg == TopKConfig(d_in=8, d_sae=24, k=3)
    assert hash(sae.cfg) == hash(other.cfg)
    assert "hook_layer" not in sae.cfg.to_dict()
    assert not hasattr(other.cfg, "metadata")
    assert not hasattr(other.cfg, "hook_nmae")
    with pytest.raises(ValidationError):
        sae.cfg.k = 4
    with pytest.raises(ValidationError):
        sae.cfg.anything = 4


def test_config_that_two_dictionaries_were_made_of_is_not_shared() -> None:
    config = TopKConfig(d_in=8, d_sae=24, k=3)
    first, second = (TopKSAE(config, hook_point=f"model.layers.{n}") for n in range(2))
    assert (first.cfg.hook_layer, second.cfg.hook_layer) == (0, 1)
    assert config.hook_layer is None


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))],  # noqa: S301
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_what_was_told(copied: object) -> None:
    again = copied(trained())
    assert again.cfg.hook_name == "blocks.3.hook_resid_post"
    again.hook_point = "model.layers.5"
    assert again.cfg.hook_layer == 5


def test_config_is_recorded_as_other_libraries_record_theirs() -> None:
    record = asdict(trained().cfg)
    assert (record["d_sae"], record["hook_layer"], record["dtype"]) == (24, 3, "float32")


def test_decoder_norms_are_checked() -> None:
    sae = JumpReLUSAE(JumpReLUConfig(d_in=8, d_sae=24))
    assert sae.check_decoder_norms()
    with torch.no_grad():
        sae.W_dec[3] *= 1.001
    assert not sae.check_decoder_norms()
    assert sae.to(torch.bfloat16).check_decoder_norms()


@pytest.mark.parametrize("fixture", ["saelens_v6_standard_layer_norm", "openai_v5_topk"])
def test_decode_of_what_encode_returned_needs_no_input(fixture: str) -> None:
    sae = load_sae(FIXTURES / fixture)
    x = torch.randn(2, 5, 32)
    acts = sae.encode(x)
    torch.testing.assert_close(sae.decode(acts), sae(x.reshape(-1, 32)).x_hat.reshape(x.shape))
    acts[..., 0] = 3
    torch.testing.assert_close(sae.decode(acts), sae.decode(acts.clone(), x))
    with pytest.raises(ConfigError, match="needs the input to undo it"):
        sae.decode(acts.clone())
