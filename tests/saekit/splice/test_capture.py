"""What `capture` gives a dictionary is what its release means, computed here from the model's weights by the definition."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saekit as sk
from saekit.errors import ConfigError, HookPointError, ModelError
from saekit.sae import MultiLayerConfig, MultiLayerDictionary, Site, TopKConfig, TopKSAE
from saekit.sae.activation import ReLU
from saekit.sae.hook_names import tl_site
from tests.saekit.splice.conftest import Models, dictionary, hooks_left

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
NAMES = {
    "llama": "meta-llama/Llama-3.2-1B",
    "qwen2": "Qwen/Qwen2-0.5B",
    "gemma2": "gemma-2-2b",
    "gemma3": "google/gemma-3-1b-pt",
    "gpt2": "gpt2-small",
    "neox": "EleutherAI/pythia-70m",
}
PARTS = {  # attention's output projection, MLP's output projection, second norm, norms after attention and MLP
    "llama": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm", None, None),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm", None, None),
    "gemma2": (
        "self_attn.o_proj",
        "mlp.down_proj",
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "ln_2", None, None),
    "neox": ("attention.dense", "mlp.dense_4h_to_h", "post_attention_layernorm", None, None),
}
PARTS["gemma3"] = PARTS["gemma2"]
LAYERS = {"gpt2": "transformer.h", "neox": "gpt_neox.layers"}


def definitions(family: str, model: nn.Module, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """TransformerLens' activations of one block: two matmuls' inputs are recorded, everything else is arithmetic on weights."""
    modules = dict(model.named_modules())
    block = f"{LAYERS.get(family, 'model.layers')}.{layer}"
    out_attn, out_mlp, norm2, post_attn, post_mlp = PARTS[family]
    seen: dict[str, Tensor] = {}
    handles = [
        modules[f"{block}.{name}"].register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].clone())
        )
        for name in (out_attn, out_mlp)
    ]
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    pre = states[layer]
    z, post = seen[out_attn], seen[out_mlp]
    attn, mlp = linear(modules[f"{block}.{out_attn}"], z), linear(modules[f"{block}.{out_mlp}"], post)
    if post_attn and post_mlp:
        attn, mlp = (
            normalised(part, modules[f"{block}.{name}"]) * gain(modules[f"{block}.{name}"])
            for part, name in ((attn, post_attn), (mlp, post_mlp))
        )
    mid = pre if family == "neox" else pre + attn
    second = modules[f"{block}.{norm2}"]
    scaled = normalised(mid, second)
    into_mlp = scaled * gain(second) + (second.bias if isinstance(second, nn.LayerNorm) else 0.0)
    found = {
        "hook_resid_pre": pre,
        "hook_resid_post": pre + attn + mlp,
        "attn.hook_z": z,
        "hook_attn_out": attn,
        "ln2.hook_normalized": scaled,
        "mlp.hook_in": into_mlp,
        "mlp.hook_post": post,
        "hook_mlp_out": mlp,
    }
    return found if family == "neox" else found | {"hook_resid_mid": mid}


def linear(module: nn.Module, x: Tensor) -> Tensor:
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    return x @ weight + (0.0 if module.bias is None else module.bias)


def gain(norm: nn.Module) -> Tensor:
    return 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    eps = next(getattr(norm, key) for key in ("variance_epsilon", "eps") if hasattr(norm, key))
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("family", NAMES)
def test_capture_gives_what_every_hook_name_means(family: str, models: Models, tokens: Tensor) -> None:
    model = models(family, 3)
    for layer in (0, 2):
        for hook, expected in definitions(family, model, tokens, layer).items():
            site = tl_site(f"blocks.{layer}.{hook}", NAMES[family])
            assert site is not None, hook
            sae = dictionary(site, d_in=expected.shape[-1], d_out=expected.shape[-1])
            x = sk.capture(model, tokens, sae)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=2e-5, msg=lambda text, hook=hook: f"{hook}: {text}")
            assert sae.encode(x).shape == (2, 7, 40)


@pytest.mark.parametrize(
    ("fixture", "below", "family", "layer", "hook"),
    [
        ("gemmascope_res", "google/gemma-scope-2b-pt-res", "gemma2", None, "hook_resid_post"),
        ("gemmascope_transcoder", "google/gemma-scope-2b-pt-transcoders", "gemma2", None, "ln2.hook_normalized"),
        ("gemmascope2_attn_out", "", "gemma3", 13, "attn.hook_z"),
        ("gemmascope2_transcoder", "", "gemma3", 13, "mlp.hook_in"),
        ("dictlearn_batch_topk", "", "neox", 5, "hook_resid_post"),
        ("llamascope_transcoder", "", "llama", 15, "ln2.hook_normalized"),
        ("sparsify_groupmax", "", "gpt2", 5, "hook_resid_post"),
        ("connor_attn", "", "gpt2", 5, "attn.hook_z"),
        ("apollo_e2e", "", "gpt2", 6, "hook_resid_pre"),
        ("saelens_v6_standard_hook_z", "", "gpt2", 5, "attn.hook_z"),
        ("mwhanna_qwen3_transcoder", "", "qwen2", 0, "mlp.hook_in"),
    ],
)
def test_capture_gives_released_dictionaries_their_input(
    fixture: str, below: str, family: str, layer: int | None, hook: str, models: Models, tokens: Tensor, tmp_path: Path
) -> None:
    folder = FIXTURES / fixture
    if below:
        # Gemma Scope's files do not say what they are of: their repository does.
        shutil.copytree(folder, tmp_path / below)
        folder = tmp_path / below
    sae = sk.load_sae(folder)
    if layer is None:
        layer = int(str(sae.hook_point).split(".")[2])
    model = models(family, layer + 1)
    x = sk.capture(model, tokens, sae)
    torch.testing.assert_close(x, definitions(family, model, tokens, layer)[hook], rtol=1e-4, atol=5e-5)
    assert sae.encode(x).isfinite().all()


def test_capture_centres_what_was_trained_on_centred_weights(models: Models, tokens: Tensor) -> None:
    sae = sk.load_sae(FIXTURES / "saelens_v1_standard")
    model = models("gpt2", 6)
    pre = definitions("gpt2", model, tokens, 5)["hook_resid_pre"]
    torch.testing.assert_close(sk.capture(model, tokens, sae), pre - pre.mean(dim=-1, keepdim=True))
    assert sae.source["prepend_bos"] is True


def test_capture_stacks_the_layers_of_a_crosscoder(models: Models, tokens: Tensor) -> None:
    sae = many_layers(("model.layers.0", "model.layers.2"))
    x = sk.capture(models("llama", 3), tokens, sae)
    expected = [definitions("llama", models("llama", 3), tokens, layer)["hook_resid_post"] for layer in (0, 2)]
    torch.testing.assert_close(x, torch.stack(expected, dim=2))
    assert sae.encode(x).shape == (2, 7, 24)


def test_capture_reads_each_model_that_a_crosscoder_compares(models: Models, tokens: Tensor) -> None:
    sae = many_layers(("model.layers.1", "model.layers.1"))
    pair = [models("llama", 3), models("qwen2", 3)]
    x = sk.capture(pair, tokens, sae)
    for index, model in enumerate(pair):
        torch.testing.assert_close(x[:, :, index], sk.capture(model, tokens, ["model.layers.1"])["model.layers.1"])
    with pytest.raises(ConfigError, match="1 models for a dictionary of 2, needs one for each"):
        sk.capture(pair[0], tokens, sae)
    with pytest.raises(ConfigError, match="the dictionary compares 2 models"), sk.attach(pair[0], sae, "observe"):
        pass


def many_layers(points: tuple[str, ...]) -> MultiLayerDictionary:
    generator = torch.Generator().manual_seed(2)
    num = len(points)
    cfg = MultiLayerConfig(
        d_in=32,
        d_sae=24,
        d_out=32,
        num_layers_in=num,
        num_layers_out=num,
        encoder="sum",
        targets=((0, num),),
        activation=ReLU(),
        sites=tuple(Site(path=point) for point in points),
    )
    shapes = {"W_enc": (num, 32, 24), "b_enc": (1, 24), "b_dec": (num, 32), "decoders.0": (24, num, 32)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return MultiLayerDictionary(cfg, tensors)


@pytest.mark.parametrize(
    "released", ["model.language_model.layers.1", "model.layers.1", "language_model.model.layers.1", "layers.1"]
)
def test_paths_are_found_under_the_prefix_that_this_model_has(released: str, models: Models, tokens: Tensor) -> None:
    model = models("gemma3", 3)
    whole = definitions("gemma3", model, tokens, 1)["hook_resid_post"]
    torch.testing.assert_close(sk.capture(model, tokens, dictionary(Site(path=released))), whole)
    # Without a language head the prefix is gone, inside a wrapper there is another one.
    torch.testing.assert_close(sk.capture(model.model, tokens, dictionary(Site(path=released))), whole)


def test_paths_are_found_inside_a_wrapper(models: Models, tokens: Tensor) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.base, self.config = inner, inner.config

        def forward(self, **arguments: object) -> object:
            return self.base(**arguments)

    model = models("llama", 3)
    x = sk.capture(Wrapper(model), tokens, dictionary(Site(path="model.layers.1")))
    assert torch.equal(x, sk.capture(model, tokens, ["model.layers.1"])["model.layers.1"])


def test_capture_takes_trained_dictionaries_and_leaves_the_model_alone(models: Models, tokens: Tensor) -> None:
    model = models("llama", 3)
    sae = TopKSAE(TopKConfig(d_in=32, d_sae=64, k=4), hook_point="model.layers.1.mlp:input")
    x = sk.capture(model, tokens, sae)
    torch.testing.assert_close(x, definitions("llama", model, tokens, 1)["mlp.hook_in"], rtol=1e-4, atol=2e-5)
    assert not x.requires_grad
    assert not hooks_left(model)


def test_capture_in_bfloat16_takes_the_step_in_float32(models: Models, tokens: Tensor) -> None:
    model = models("gpt2", 3)
    plain = sk.capture(model, tokens, ["transformer.h.1"])["transformer.h.1"]
    half = copy.deepcopy(model).to(torch.bfloat16)
    x = sk.capture(half, tokens, dictionary(Site(path="transformer.h.1", transform="centered")))
    assert x.dtype == torch.float32
    assert x.mean(dim=-1).abs().max() < 1e-6
    assert (x - (plain - plain.mean(-1, keepdim=True))).norm() / plain.norm() < 0.05


@pytest.mark.parametrize(("prepend", "expected"), [(None, 0), (True, 1), (False, 0)])
def test_text_gets_the_bos_token_that_the_release_had(
    prepend: bool | None, expected: int, tiny_model_dir: Callable[[str], Path]
) -> None:
    lm = sk.load_model(str(tiny_model_dir("llama")))
    sae = dictionary(Site(path="model.layers.1"))
    sae.source["prepend_bos"] = prepend
    # This tokenizer adds none of its own accord.
    ids = lm.tokenizer("the river")["input_ids"]
    x = sk.capture(lm, "the river", sae)
    assert x.shape == (1, len(ids) + expected, 32)
    bos = [lm.tokenizer.bos_token_id] * expected
    assert torch.equal(x, sk.capture(lm, torch.tensor([[*bos, *ids]]), sae))


def test_what_cannot_be_captured_is_said_in_one_line(models: Models, tokens: Tensor) -> None:
    model = models("llama", 3)
    unplaced = TopKSAE(TopKConfig(d_in=32, d_sae=64, k=4))
    with pytest.raises(ConfigError, match="its files do not say where it reads, needs a hook point"):
        sk.capture(model, tokens, unplaced)
    with pytest.raises(ConfigError, match=r"width 32 at 'model\.layers\.1', the dictionary needs 16"):
        sk.capture(model, tokens, dictionary(Site(path="model.layers.1"), d_in=16))
    with pytest.raises(HookPointError, match=r"no such module; .*; is this the model that the dictionary was made for"):
        sk.capture(model, tokens, dictionary(Site(path="model.layers.7")))
    with pytest.raises(ModelError, match="a Linear, needs a transformers model"):
        sk.capture(nn.Linear(2, 2), tokens, unplaced)
    with pytest.raises(ModelError, match="text and no tokenizer, needs token ids"):
        sk.capture(model, "text", dictionary(Site(path="model.layers.1")))
    with pytest.raises(ConfigError, match="2 models at hook points, needs one"):
        sk.capture([model, model], tokens, ["model.layers.1"])
