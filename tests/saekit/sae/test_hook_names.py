"""Hook names of other libraries, and what is captured at the sites that they stand for, on tiny models of every layout."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saekit.models import LanguageModel, ModelConfig, capture, load_model
from saekit.models.hooks import resolve
from saekit.sae.hook_names import hf_site, model_family, module_site, tl_site

LAYOUTS = {
    "llama": "meta-llama/Llama-3.2-1B",
    "qwen2": "Qwen/Qwen2-0.5B",
    "gemma2": "gemma-2-2b",
    "gemma3": "google/gemma-3-1b-pt",
    "gpt2": "gpt2-small",
    "neox": "EleutherAI/pythia-70m",
}
NAMES = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "attn.hook_z",
    "hook_attn_out",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "mlp.hook_post",
    "hook_mlp_out",
)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """A function: layout -> its tiny random model, with gains and biases of norms that change the numbers."""
    made: dict[str, LanguageModel] = {}

    def load(family: str) -> LanguageModel:
        if family not in made:
            lm = load_model(ModelConfig(name=str(tiny_model_dir(family)), device="cpu", dtype="float32"))
            generator = torch.Generator().manual_seed(7)
            for name, parameter in lm.model.named_parameters():
                if "norm" in name or ".ln_" in name:
                    noise = torch.rand(parameter.shape, generator=generator).to(parameter)
                    parameter.data.add_(0.5 * noise + 0.1)
            made[family] = lm
        return made[family]

    return load


def read(lm: LanguageModel, tokens: Tensor, hook: str, name: str, *, centered: bool = False) -> Tensor | None:
    """What a dictionary of hook `hook` reads in this model."""
    site = tl_site(hook, name, centered=centered)
    if site is None:
        return None
    hidden = capture(lm, tokens, [str(site)])[str(site)]
    return site.values(hidden, resolve(lm, str(site)))


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    """x brought to the norm's scale, without its gain and bias."""
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps)
    eps = next(getattr(norm, key) for key in ("variance_epsilon", "eps") if hasattr(norm, key))
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


@pytest.mark.parametrize("family", LAYOUTS)
def test_sites_hold_what_their_names_mean(family: str, model: Callable[[str], LanguageModel]) -> None:
    """The residual stream adds up from them, and each part follows from the one before by the model's own modules."""
    lm, name = model(family), LAYOUTS[family]
    tokens = torch.tensor([[3, 5, 8, 13, 21, 34]])
    found = {hook: read(lm, tokens, f"blocks.1.{hook}", name) for hook in NAMES}
    pre, mid, post = (found[f"hook_resid_{part}"] for part in ("pre", "mid", "post"))
    attn, mlp = found["hook_attn_out"], found["hook_mlp_out"]
    assert pre is not None
    assert post is not None
    assert attn is not None
    assert mlp is not None
    torch.testing.assert_close(pre + attn + mlp, post)
    if family == "neox":
        assert mid is None
    else:
        assert mid is not None
        torch.testing.assert_close(pre + attn, mid)
    torch.testing.assert_close(read(lm, tokens, "blocks.0.hook_resid_post", name), pre)
    modules = dict(lm.model.named_modules())
    first, second = (tl_site(f"blocks.1.{norm}.hook_normalized", name) for norm in ("ln1", "ln2"))
    assert first is not None
    assert second is not None
    torch.testing.assert_close(found["ln1.hook_normalized"], normalised(pre, modules[first.path]))
    source = pre if mid is None else mid
    torch.testing.assert_close(found["ln2.hook_normalized"], normalised(source, modules[second.path]))
    torch.testing.assert_close(found["mlp.hook_in"], modules[second.path](source))
    assert tl_site("blocks.1.mlp.hook_in", name) is not None


@pytest.mark.parametrize("family", LAYOUTS)
def test_attention_and_mlp_outputs_follow_from_their_inner_sites(
    family: str, model: Callable[[str], LanguageModel]
) -> None:
    lm, name = model(family), LAYOUTS[family]
    tokens = torch.tensor([[3, 5, 8, 13, 21, 34]])
    modules = dict(lm.model.named_modules())
    layer = str(tl_site("blocks.1.hook_resid_post", name))
    z, post = read(lm, tokens, "blocks.1.attn.hook_z", name), read(lm, tokens, "blocks.1.mlp.hook_post", name)
    projections = {
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
        "neox": ("attention.dense", "mlp.dense_4h_to_h"),
    }.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    attn, mlp = modules[f"{layer}.{projections[0]}"](z), modules[f"{layer}.{projections[1]}"](post)
    if family.startswith("gemma"):
        # Gemma adds the outputs to the stream after a norm of their own.
        attn = modules[f"{layer}.post_attention_layernorm"](attn)
        mlp = modules[f"{layer}.post_feedforward_layernorm"](mlp)
    torch.testing.assert_close(read(lm, tokens, "blocks.1.hook_attn_out", name), attn)
    torch.testing.assert_close(read(lm, tokens, "blocks.1.hook_mlp_out", name), mlp)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_embedding_is_what_the_first_layer_reads(family: str, model: Callable[[str], LanguageModel]) -> None:
    lm, tokens = model(family), torch.tensor([[3, 5, 8]])
    embedded = read(lm, tokens, "hook_embed", LAYOUTS[family])
    torch.testing.assert_close(embedded, read(lm, tokens, "blocks.0.hook_resid_pre", LAYOUTS[family]))


def test_embedding_of_gemma_is_scaled_by_the_root_of_the_width(model: Callable[[str], LanguageModel]) -> None:
    lm, tokens = model("gemma2"), torch.tensor([[3, 5, 8]])
    table = dict(lm.model.named_modules())["model.embed_tokens"].weight
    torch.testing.assert_close(read(lm, tokens, "hook_embed", "gemma-2-2b"), table[tokens].detach() * math.sqrt(32))


def test_centered_writing_weights_are_the_stream_less_its_mean(model: Callable[[str], LanguageModel]) -> None:
    """Every module that writes into the stream, its mean over the width taken out: what TransformerLens does to the weights."""
    lm, tokens = model("gpt2"), torch.tensor([[3, 5, 8, 13]])
    read_by_it = read(lm, tokens, "blocks.1.hook_resid_pre", "gpt2-small", centered=True)
    saved = {key: value.clone() for key, value in lm.model.state_dict().items()}
    with torch.no_grad():
        for key, value in lm.model.named_parameters():
            if key.endswith(("wte.weight", "wpe.weight", "c_proj.weight")):
                value -= value.mean(dim=-1, keepdim=True)
            elif key.endswith("c_proj.bias"):
                value -= value.mean()
    plain = read(lm, tokens, "blocks.1.hook_resid_pre", "gpt2-small")
    lm.model.load_state_dict(saved)
    torch.testing.assert_close(read_by_it, plain)
    site = tl_site("blocks.1.attn.hook_z", "gpt2-small", centered=True)
    assert site is not None
    assert site.transform == "none"


@pytest.mark.parametrize(
    ("model_name", "family"),
    [
        ("gemma-2b", "gemma1"),
        ("gemma-2-2b", "gemma2"),
        ("google/gemma-2-9b-it", "gemma2"),
        ("google/gemma-3-270m", "gemma3"),
        ("gemma-v3-1b-pt", "gemma3"),
        ("google/gemma-3-4b-it", "gemma3_multimodal"),
        ("google/gemma-scope-2b-pt-res", "gemma2"),
        ("google/gemma-scope-2-12b-it", "gemma3_multimodal"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama"),
        ("mistral-7b", "llama"),
        ("gpt2-small", "gpt2"),
        ("pythia-70m-deduped", "neox"),
        ("some-new-model", None),
        (None, None),
    ],
)
def test_model_family_is_told_by_its_name(model_name: str | None, family: str | None) -> None:
    assert model_family(model_name) == family


@pytest.mark.parametrize(
    ("name", "model_name", "expected"),
    [
        ("model.layers.13.output", "google/gemma-3-1b-pt", "model.layers.13"),
        ("model.layers.13.self_attn.o_proj.input", "google/gemma-3-1b-pt", "model.layers.13.self_attn.o_proj:input"),
        ("model.layers.13.output", "google/gemma-3-4b-pt", "model.language_model.layers.13"),
        ("model.layers.0", "Qwen/Qwen3-1.7B-Base", "model.layers.0"),
    ],
)
def test_hf_names_are_taken_by_path_and_side(name: str, model_name: str, expected: str) -> None:
    assert str(hf_site(name, model_name)) == expected


@pytest.mark.parametrize(
    ("name", "model_name", "expected"),
    [
        ("embed_tokens", "Llama-3", "model.embed_tokens"),
        ("h.5.attn", None, "transformer.h.5.attn"),
        ("layers.5.attention", None, "gpt_neox.layers.5.attention"),
        ("model.layers.18.mlp", "llama-3", "model.layers.18.mlp"),
        ("layers.3", None, "layers.3"),
        ("layer_3", None, "layers.3"),
        ("layers.3", "gpt2", "None"),
        ("anything", "llama", "None"),
    ],
)
def test_paths_below_the_base_model_get_their_prefix(name: str, model_name: str | None, expected: str) -> None:
    assert str(module_site(name, model_name)) == expected


@pytest.mark.parametrize(
    ("name", "model_name"),
    [
        ("blocks.3.hook_resid_mid", "pythia-70m"),
        ("blocks.3.mlp.hook_out", "gemma-2-2b"),
        ("blocks.3.attn.hook_pattern", "gpt2"),
        ("blocks.3.hook_resid_pre", "unknown"),
        ("hook_nothing", "gpt2"),
    ],
)
def test_names_that_mean_nothing_certain_have_no_site(name: str, model_name: str) -> None:
    assert tl_site(name, model_name) is None


def test_gain_cannot_be_removed_from_a_module_without_one() -> None:
    site = tl_site("blocks.0.ln2.hook_normalized", "llama")
    assert site is not None
    with pytest.raises(ValueError, match="Identity has no weight, needs a norm with a gain"):
        site.values(torch.ones(2, 3), nn.Identity())
    norm = nn.LayerNorm(3)
    nn.init.zeros_(norm.weight)
    with pytest.raises(ValueError, match="the norm's gain has zeros, needs none to divide by"):
        site.values(torch.ones(2, 3), norm)
