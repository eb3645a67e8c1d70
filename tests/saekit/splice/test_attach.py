"""Dictionaries in a running model: what is replaced, what is left bit for bit, what an edit does, and that nothing stays."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saekit as sk
from saekit.errors import ConfigError, HookPointError
from saekit.sae import (
    MLSAE,
    SAE,
    JumpReLUConfig,
    JumpReLUSAE,
    MLSAEConfig,
    MultiLayerConfig,
    MultiLayerDictionary,
    Site,
    TopKConfig,
    TopKSAE,
    Transcoder,
    TranscoderConfig,
)
from saekit.sae.activation import LayerTopK, ReLU
from saekit.sae.hook_names import tl_site
from tests.saekit.splice.conftest import Models, dictionary, hooks_left

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
MODES = ("replace", "replace_with_error", "observe")


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def by_hand(model: nn.Module, tokens: Tensor, path: str, value: Tensor) -> Tensor:
    """The logits if a module returned `value`, by a hook of the test's own that keeps tuples as they are."""

    def put(_: nn.Module, __: object, output: object) -> object:
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = dict(model.named_modules())[path].register_forward_hook(put)
    try:
        return logits(model, tokens)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "model.layers.1"),
        ("llama", "model.layers.1.self_attn"),  # returns a tuple
        ("gpt2", "transformer.h.1"),
        ("gpt2", "transformer.h.1.attn"),
        ("neox", "gpt_neox.layers.1.attention"),
        ("gemma3", "model.layers.1.post_feedforward_layernorm"),
    ],
)
def test_replace_puts_the_reconstruction_in_place(family: str, path: str, models: Models, tokens: Tensor) -> None:
    model, sae = models(family, 3), dictionary(Site(path=path))
    clean, x = logits(model, tokens), sk.capture(model, tokens, sae)
    x_hat = sae.decode(sae.encode(x))
    expected = by_hand(model, tokens, path, x_hat)
    with sk.attach(model, sae) as attached:
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(attached.feature_acts, sae.encode(x))
    assert not torch.allclose(expected, clean, atol=1e-3)
    assert torch.equal(logits(model, tokens), clean)
    assert not hooks_left(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "neox"])
@pytest.mark.parametrize(
    "hook", ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "ln2.hook_normalized"]
)
def test_error_keeps_the_output_bit_for_bit_at_every_kind_of_site(
    family: str, hook: str, models: Models, tokens: Tensor
) -> None:
    model = models(family, 3)
    site = tl_site(f"blocks.1.{hook}", {"neox": "pythia"}.get(family, f"{family}-2b".replace("gemma2", "gemma-2")))
    assert site is not None
    sae, clean = dictionary(site), logits(model, tokens)
    with sk.attach(model, sae, "replace_with_error"):
        assert torch.equal(logits(model, tokens), clean)
    with sk.attach(model, sae, "observe") as attached:
        assert torch.equal(logits(model, tokens), clean)
    assert torch.equal(attached.feature_acts, sae.encode(sk.capture(model, tokens, sae)))
    with sk.attach(model, sae, "replace"):
        assert not torch.allclose(logits(model, tokens), clean, atol=1e-3)


@pytest.mark.parametrize(
    ("transform", "path"), [("centered", "transformer.h.1"), ("without_gain", "transformer.h.1.ln_2")]
)
def test_replace_undoes_the_step_of_its_site(transform: str, path: str, models: Models, tokens: Tensor) -> None:
    model = models("gpt2", 3)
    site = Site.model_validate({"path": path, "transform": transform})
    sae = dictionary(site)
    hidden = sk.capture(model, tokens, [path])[path]
    x_hat = sae(sk.capture(model, tokens, sae).reshape(-1, 32)).x_hat.reshape(2, 7, 32)
    norm = dict(model.named_modules())[path]
    value = x_hat + hidden.mean(-1, keepdim=True) if transform == "centered" else x_hat * norm.weight + norm.bias
    expected = by_hand(model, tokens, path, value)
    with sk.attach(model, sae):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_edit_adds_exactly_its_own_effect(models: Models, tokens: Tensor) -> None:
    model, path = models("llama", 3), "model.layers.1"
    sae = dictionary(Site(path=path))
    x = sk.capture(model, tokens, sae)

    def steer(feature_acts: Tensor) -> Tensor:
        changed = feature_acts.clone()
        changed[..., 3] = 5.0
        changed[..., 7] = 0.0
        return changed

    acts = sae.encode(x)
    expected = by_hand(model, tokens, path, x + (steer(acts) - acts) @ sae.W_dec)
    with sk.attach(model, sae, "replace_with_error", edit=steer) as attached:
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert (attached.feature_acts[..., 3] == 5).all()
    assert not attached.feature_acts[..., 7].any()

    def in_place(feature_acts: Tensor) -> Tensor:
        feature_acts[..., 3], feature_acts[..., 7] = 5.0, 0.0
        return feature_acts

    with sk.attach(model, sae, "replace_with_error", edit=in_place):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    with sk.attach(model, sae, "replace_with_error", edit=lambda acts: acts.clone()):
        assert torch.equal(logits(model, tokens), logits_without(model, tokens))


def logits_without(model: nn.Module, tokens: Tensor) -> Tensor:
    assert len(hooks_left(model)) > 0
    saved = [(m, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    found = logits(model, tokens)
    for module, hooks, pre_hooks in saved:
        module._forward_hooks.update(hooks)
        module._forward_pre_hooks.update(pre_hooks)
    return found


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_gradients_reach_features_and_what_comes_before(mode: str, models: Models, tokens: Tensor) -> None:
    model = models("llama", 3)
    sae = dictionary(Site(path="model.layers.1"))
    leaves: list[Tensor] = []

    def as_leaf(feature_acts: Tensor) -> Tensor:
        leaves.append(feature_acts.detach().requires_grad_())
        return leaves[-1]

    with sk.attach(model, sae, mode, edit=as_leaf):
        logits(model, tokens)[:, -1, 3].sum().backward()
    gradient = leaves[0].grad
    assert gradient is not None
    # Finite differences of one feature at one position.
    index = tuple(int(i) for i in (leaves[0] > 0).nonzero()[5])
    step = 1e-2
    values = []
    for sign in (1, -1):

        def moved(feature_acts: Tensor, sign: int = sign) -> Tensor:
            changed = feature_acts.clone()
            changed[index] += sign * step
            return changed

        with torch.no_grad(), sk.attach(model, sae, mode, edit=moved):
            values.append(logits(model, tokens)[:, -1, 3].sum())
    assert float(gradient[index]) == pytest.approx(float(values[0] - values[1]) / (2 * step), rel=0.05, abs=1e-4)
    embeddings = model.get_input_embeddings()(tokens).requires_grad_()
    with sk.attach(model, sae, mode):
        model(inputs_embeds=embeddings, use_cache=False).logits[:, -1, 3].sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_transcoder_takes_the_mlps_place(mode: str, has_skip: bool, models: Models, tokens: Tensor) -> None:
    model = models("llama", 3)
    sae = dictionary(
        Site(path="model.layers.1.mlp", side="input"), site_out=Site(path="model.layers.1.mlp"), has_skip=has_skip
    )
    x = sk.capture(model, tokens, sae)
    y_hat = sae.encode(x) @ sae.W_dec + sae.b_dec + (x @ sae.W_skip if has_skip else 0.0)
    expected = logits(model, tokens) if mode != "replace" else by_hand(model, tokens, "model.layers.1.mlp", y_hat)
    with sk.attach(model, sae, mode):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "transcoder", "skip"])
def test_trained_dictionaries_attach_too(kind: str, models: Models, tokens: Tensor) -> None:
    model, path = models("llama", 3), "model.layers.1.mlp"
    sae: SAE
    match kind:
        case "topk":
            sae = TopKSAE(TopKConfig(d_in=32, d_sae=64, k=4), hook_point=path)
        case "jumprelu":
            sae = JumpReLUSAE(JumpReLUConfig(d_in=32, d_sae=64), hook_point=path)
        case _:
            cfg = TranscoderConfig(d_in=32, d_out=32, d_sae=64, k=4, has_skip=kind == "skip")
            sae = Transcoder(cfg, hook_point=f"{path}:input", source={"target_hook_point": path})
            if sae.W_skip is not None:
                nn.init.normal_(sae.W_skip, std=0.3)
    x = sk.capture(model, tokens, sae)
    x_hat = sae(x.reshape(-1, 32)).x_hat.reshape(2, 7, 32)
    expected = by_hand(model, tokens, path, x_hat)
    with sk.attach(model, sae):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    with sk.attach(model, sae, "replace_with_error", edit=lambda acts: acts * 1):
        replaced = logits(model, tokens)
    torch.testing.assert_close(replaced, logits(model, tokens), rtol=0, atol=0)


def test_dictionary_that_normalises_tokens_gets_its_own_scale_back(models: Models, tokens: Tensor) -> None:
    sae = sk.load_sae(FIXTURES / "openai_v5_topk", hook_point="transformer.h.1")
    model = models("gpt2", 3)
    x = sk.capture(model, tokens, sae)
    expected = by_hand(model, tokens, "transformer.h.1", sae(x.reshape(-1, 32)).x_hat.reshape(2, 7, 32))
    with sk.attach(model, sae):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_temporal_dictionary_keeps_the_predicted_part(models: Models, tokens: Tensor) -> None:
    sae = sk.load_sae(FIXTURES / "temporal_hub")
    narrow = sae.d_in  # 16, half of the model's width
    model = models("llama", 13)
    with pytest.raises(ConfigError, match="needs"), sk.attach(model, sae):
        logits(model, tokens)
    assert not hooks_left(model)
    x = torch.randn(2, 7, narrow)
    from saekit.splice.attached import SingleAttached

    attached = SingleAttached(sae, lambda acts: acts * 0)
    attached.see(0, x)
    edited, unedited = attached.write(0)
    assert unedited is not None
    torch.testing.assert_close(unedited, sae(x).x_hat)
    torch.testing.assert_close(
        edited - unedited, -(sae.encode(x) @ sae.W_dec) / sae.cfg.input_scale, atol=1e-5, rtol=1e-4
    )


def cross_layer(
    *, reach_back: float | None = None, activation: object = None, encoder: str = "own"
) -> MultiLayerDictionary:
    generator = torch.Generator().manual_seed(4)
    num, d, features = 3, 32, 20
    is_dense = reach_back is not None
    targets = tuple((0, num) if is_dense else (s, num - s) for s in range(num))
    shapes = {"W_enc": (num, d, features), "b_enc": (num, features), "b_dec": (num, d), "W_skip": (num, d, d)}
    shapes |= {f"decoders.{s}": (features, count, d) for s, (_, count) in enumerate(targets)}
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if reach_back is not None:
        for source in range(num):
            tensors[f"decoders.{source}"][:, :source] *= reach_back
    cfg = MultiLayerConfig.model_validate(
        {
            "d_in": d,
            "d_sae": features,
            "d_out": d,
            "num_layers_in": num,
            "num_layers_out": num,
            "encoder": encoder,
            "targets": targets,
            "activation": activation or ReLU(),
            "sites": [Site(path=f"model.layers.{n}.mlp", side="input") for n in range(num)],
            "sites_out": [Site(path=f"model.layers.{n}.mlp") for n in range(num)],
        }
    )
    return MultiLayerDictionary(cfg, tensors).requires_grad_(False)


@pytest.mark.parametrize("reach_back", [None, 0.0])
def test_cross_layer_transcoder_takes_every_mlps_place(
    reach_back: float | None, models: Models, tokens: Tensor
) -> None:
    """Layer by layer by hand: each MLP returns what the features so far write to it, and later features read the result."""
    model, sae = models("llama", 3), cross_layer(reach_back=reach_back)
    modules = dict(model.named_modules())
    acts: dict[int, Tensor] = {}
    handles = []
    for layer in range(3):

        def mlp(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> Tensor:
            acts[layer] = torch.relu(args[0] @ sae.W_enc[layer] + sae.b_enc[layer])
            y = sae.b_dec[layer] + args[0] @ sae.W_skip[layer]
            for source in range(layer + 1):
                y = y + acts[source] @ sae.decoders[source][:, layer - sae.cfg.targets[source][0]]
            return y

        handles.append(modules[f"model.layers.{layer}.mlp"].register_forward_hook(mlp))
    expected = logits(model, tokens)
    for handle in handles:
        handle.remove()
    clean = logits(model, tokens)
    with sk.attach(model, sae) as attached:
        for _ in range(2):  # a second forward starts anew
            torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        attached.feature_acts, torch.stack([acts[n] for n in range(3)], dim=2), rtol=1e-4, atol=1e-4
    )
    with sk.attach(model, sae, "replace_with_error") as attached:
        assert torch.equal(logits(model, tokens), clean)
    torch.testing.assert_close(attached.feature_acts, sae.encode(sk.capture(model, tokens, sae)), rtol=1e-5, atol=1e-5)

    def only_first(feature_acts: Tensor, layer: int) -> Tensor:
        return feature_acts + 1 if layer == 0 else feature_acts

    with sk.attach(model, sae, "replace_with_error", edit=only_first):
        assert not torch.allclose(logits(model, tokens), clean, atol=1e-3)


def test_layers_that_write_back_can_only_be_observed(models: Models, tokens: Tensor) -> None:
    model, sae = models("llama", 3), cross_layer(reach_back=1.0)
    with pytest.raises(ConfigError, match=r"features of layer 1 write back to layer 0, .* needs mode 'observe'"):
        sk.attach(model, sae).__enter__()
    for shared in (cross_layer(activation=LayerTopK(k=3)), cross_layer(encoder="sum_per_layer")):
        with pytest.raises(ConfigError, match=r"read or compete across layers .* needs mode 'observe'"):
            sk.attach(model, shared).__enter__()
        with sk.attach(model, shared, "observe") as attached:
            logits(model, tokens)
        expected = shared.encode(sk.capture(model, tokens, shared))
        torch.testing.assert_close(attached.feature_acts, expected)
        top_acts, top_indices = attached.sparse()
        dense = torch.zeros_like(expected).scatter_add(-1, top_indices, top_acts)
        torch.testing.assert_close(dense, expected)
    assert not hooks_left(model)


def test_trained_dictionary_of_several_places_is_captured_and_observed(models: Models, tokens: Tensor) -> None:
    model, points = models("llama", 3), ["model.layers.0", "model.layers.2.mlp:input"]
    sae = TopKSAE(TopKConfig(d_in=32, d_sae=64, k=4), hook_point=",".join(points))
    x = sk.capture(model, tokens, sae)
    hidden = sk.capture(model, tokens, points)
    assert torch.equal(x, torch.stack([hidden[point] for point in points], dim=2))
    with sk.attach(model, sae, "observe") as attached:
        logits(model, tokens)
    assert torch.equal(attached.feature_acts, sae.encode(x))
    with pytest.raises(ConfigError, match="needs mode 'observe'"):
        sk.attach(model, sae).__enter__()


def test_mlsae_is_replaced_place_by_place(models: Models, tokens: Tensor) -> None:
    model, points = models("llama", 3), ["model.layers.0", "model.layers.2"]
    cfg = MLSAEConfig(d_in=32, d_sae=64, k=4, num_sites=2)
    sae = MLSAE(cfg, hook_point=",".join(points)).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"one SAE at each of its hook points, .* sae\.at\(hook point\)"):
        sk.attach(model, sae).__enter__()
    assert not hooks_left(model)
    with sk.attach(model, sae, "observe") as observed, sk.attach(model, sae.at(points[1])):
        replaced = logits(model, tokens)
    x = sk.capture(model, tokens, sae)
    torch.testing.assert_close(observed.feature_acts, sae.encode(x))
    torch.testing.assert_close(
        replaced, by_hand(model, tokens, points[1], sae(x.flatten(0, 1)).x_hat[:, 1].view(2, 7, 32))
    )


def test_sparsify_names_layers_whatever_the_models_prefix_is(models: Models, tokens: Tensor) -> None:
    for family, prefix in (("llama", "model"), ("neox", "gpt_neox")):
        model = models(family, 6)
        sae = sk.load_sae(FIXTURES / "sparsify_topk")
        expected = sk.capture(model, tokens, [f"{prefix}.layers.5"])[f"{prefix}.layers.5"]
        assert torch.equal(sk.capture(model, tokens, sae), expected)
    transcoder = sk.load_sae(FIXTURES / "sparsify_transcode")
    with sk.attach(models("llama", 6), transcoder):
        replaced = logits(models("llama", 6), tokens)
    read = sk.capture(models("llama", 6), tokens, transcoder)
    torch.testing.assert_close(
        replaced, by_hand(models("llama", 6), tokens, "model.layers.5.mlp", transcoder(read).x_hat.view(2, 7, 32))
    )
    with pytest.raises(ConfigError, match="dictionary_learning cannot express a transcoder"):
        sk.save_sae(transcoder, "nowhere", format="dictionary_learning")


def test_blocks_nest_at_other_places_and_at_the_same(models: Models, tokens: Tensor) -> None:
    model = models("llama", 3)
    first, second = dictionary(Site(path="model.layers.0")), dictionary(Site(path="model.layers.1"))
    with sk.attach(model, first), sk.attach(model, second) as inner:
        both = logits(model, tokens)
    with sk.attach(model, first):
        read = sk.capture(model, tokens, second)
        alone = logits(model, tokens)
    torch.testing.assert_close(inner.feature_acts, second.encode(read))
    assert not torch.allclose(both, alone, atol=1e-3)
    x = sk.capture(model, tokens, first)
    once = first.decode(first.encode(x))
    with sk.attach(model, first), sk.attach(model, first) as again:
        logits(model, tokens)
    torch.testing.assert_close(again.feature_acts, first.encode(once), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_go_with_the_block_also_after_an_error(mode: str, models: Models, tokens: Tensor) -> None:
    model = models("gpt2", 3)
    with pytest.raises(RuntimeError, match="mine"), sk.attach(model, dictionary(Site(path="transformer.h.1")), mode):
        logits(model, tokens)
        raise RuntimeError("mine")
    assert not hooks_left(model)


def test_generation_runs_through_the_dictionary(models: Models, tokens: Tensor) -> None:
    model, sae = models("llama", 3), dictionary(Site(path="model.layers.1"))
    with sk.attach(model, sae, "replace_with_error") as attached:
        inside = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(inside, model.generate(tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=0))
    assert attached.feature_acts.shape == (1, 1, 40)


def test_wrong_use_is_one_line(models: Models, tokens: Tensor) -> None:
    model, sae = models("llama", 3), dictionary(Site(path="model.layers.1"))
    with pytest.raises(ConfigError, match="mode 'watch', needs 'replace', 'replace_with_error' or 'observe'"):
        sk.attach(model, sae, "watch").__enter__()  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigError, match="an edit in mode 'observe'"):
        sk.attach(model, sae, "observe", edit=lambda acts: acts).__enter__()
    with (
        pytest.raises(ConfigError, match=r"edit returned \[2, 7, 1\], needs the shape it was given, \[2, 7, 40\]"),
        sk.attach(model, sae, edit=lambda acts: acts[..., :1]),
    ):
        logits(model, tokens)
    with sk.attach(model, sae) as attached, pytest.raises(HookPointError, match="needs a forward of the model first"):
        _ = attached.feature_acts
    backwards = dictionary(Site(path="model.layers.2"), site_out=Site(path="model.layers.1"))
    with sk.attach(model, backwards), pytest.raises(HookPointError, match="reached the output before the input"):
        logits(model, tokens)
    wide = dictionary(Site(path="model.layers.1"), site_out=Site(path="model.layers.1.mlp"), d_out=16)
    with pytest.raises((ConfigError, HookPointError)), sk.attach(model, wide):
        logits(model, tokens)
    narrow = dictionary(
        Site(path="model.layers.1.mlp", side="input"), site_out=Site(path="model.layers.1.mlp"), d_out=16
    )
    with (
        pytest.raises(ConfigError, match=r"width 32 at 'model\.layers\.1\.mlp', the dictionary writes 16"),
        sk.attach(model, narrow),
    ):
        logits(model, tokens)
    assert not hooks_left(model)
