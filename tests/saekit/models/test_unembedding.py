"""The unembedding: the model's own logits from the last residual stream, family by family."""

from dataclasses import replace as with_fields

import pytest
import torch
from torch import Tensor, nn

from saekit.errors import ModelError
from saekit.models import LanguageModel, capture, find_unembedding, logits

# Of each: config class, fields beyond the shared ones, path of the final norm.
FAMILIES = {
    "mistral": ("MistralConfig", {}, "model.norm"),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, "model.norm"),
    "gemma": ("GemmaConfig", {"head_dim": 8}, "model.norm"),
    "gemma2-softcap": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.5}, "model.norm"),
    "phi": ("PhiConfig", {}, "model.final_layernorm"),
    "phi3": ("Phi3Config", {"pad_token_id": 0}, "model.norm"),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.final_layer_norm"),
    "olmo2": ("Olmo2Config", {}, "model.norm"),
    "cohere-scale": ("CohereConfig", {"logit_scale": 0.25}, "model.norm"),
    "granite-scale": ("GraniteConfig", {"logits_scaling": 8.0}, "model.norm"),
    "gptj-bias": ("GPTJConfig", {"rotary_dim": 4}, "transformer.ln_f"),
    "bloom": ("BloomConfig", {}, "transformer.ln_f"),
}


def _random_model(kind: str) -> LanguageModel:
    import transformers as tf

    name, fields, _ = FAMILIES[kind]
    shared = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(getattr(tf, name)(**{**shared, **fields})).eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        # Norms that start at one and biases that start at zero would hide a wrong formula.
        parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel(
        model=model, tokenizer=None, name=kind, d_model=32, num_layers=2, vocab_size=96, context_len=64
    )  # type: ignore[arg-type]  # no text in these tests


@pytest.mark.parametrize("kind", FAMILIES)
def test_find_unembedding_gives_the_models_logits(kind: str) -> None:
    lm = _random_model(kind)
    found = find_unembedding(lm)
    assert found.norm_path == FAMILIES[kind][2]
    tokens = torch.randint(96, (2, 9))
    point = f"{found.norm_path}:input"
    hidden = capture(lm, tokens, [point])[point]
    torch.testing.assert_close(found.logits(hidden), logits(lm, tokens), atol=1e-5, rtol=1e-5)


def test_find_unembedding_works_on_every_shared_family(lm: LanguageModel, tokens: Tensor) -> None:
    found = find_unembedding(lm)
    assert found.weight.shape == (lm.vocab_size, lm.d_model)
    point = f"{found.norm_path}:input"
    assert torch.equal(found.logits(capture(lm, tokens, [point])[point]), logits(lm, tokens))


def test_logits_are_float32_of_a_bfloat16_model(llama: LanguageModel, tokens: Tensor) -> None:
    from copy import deepcopy

    lm = with_fields(llama, model=deepcopy(llama.model).bfloat16())
    found = find_unembedding(lm)
    hidden = capture(lm, tokens, ["model.norm:input"])["model.norm:input"]
    assert found.logits(hidden).dtype == torch.float32
    assert torch.equal(found.logits(hidden.double()), logits(lm, tokens))
    assert found.project(torch.randn(4, 32)).dtype == torch.float32


def test_project_is_the_norm_and_the_head_written_out(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several pieces of the vocabulary, as with a large one.
    monkeypatch.setattr("saekit.models.unembedding._CHUNK_ROWS", 100)
    found, directions = find_unembedding(lm), torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    weight, x = found.norm.weight.double(), directions.double()
    if isinstance(found.norm, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + found.norm.eps).sqrt() * weight
        normed = normed + found.norm.bias.double()
    else:
        gain = 1 + weight if lm.text_config.model_type.startswith("gemma") else weight
        eps = getattr(found.norm, "variance_epsilon", None) or found.norm.eps
        normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain
    expected = normed @ found.weight.double().T
    assert found.project(directions).shape == (5, lm.vocab_size)
    torch.testing.assert_close(found.project(directions).double(), expected, atol=1e-5, rtol=1e-5)


def test_project_ignores_the_length_of_a_direction(lm: LanguageModel) -> None:
    found, directions = find_unembedding(lm), torch.randn(5, 32)
    torch.testing.assert_close(found.project(7 * directions), found.project(directions), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fault", ["no-head", "head-reads-elsewhere", "logits-changed"])
def test_find_unembedding_refuses_what_it_cannot_prove(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _random_model("mistral")
    if fault == "no-head":
        monkeypatch.setattr(lm.model, "get_output_embeddings", lambda: None)
    elif fault == "head-reads-elsewhere":
        lm.model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    else:
        lm.model.register_forward_hook(lambda _, __, output: type(output)(logits=output.logits**3))
    with pytest.raises(
        ModelError, match=r"unembedding of 'mistral': .*; its modules: model \(embed_tokens, layers, norm"
    ) as caught:
        find_unembedding(lm)
    assert "\n" not in str(caught.value)
