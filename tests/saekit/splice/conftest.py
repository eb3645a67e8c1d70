"""Tiny random transformers models with as many layers as a release's layer number needs, and dictionaries at their sites."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import nn

from saekit.sae import Dictionary, DictionaryConfig, Site
from saekit.sae.activation import ReLU

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GEMMA = SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}

Models = Callable[[str, int], nn.Module]


def _config(family: str, num_layers: int) -> tf.PretrainedConfig:
    match family:
        case "llama":
            return tf.LlamaConfig(**SIZES, num_hidden_layers=num_layers, tie_word_embeddings=False)
        case "qwen2":
            return tf.Qwen2Config(**SIZES, num_hidden_layers=num_layers)
        case "gemma2":
            return tf.Gemma2Config(**GEMMA, num_hidden_layers=num_layers)
        case "gemma3":
            return tf.Gemma3TextConfig(**GEMMA, num_hidden_layers=num_layers)
        case "gpt2":
            return tf.GPT2Config(vocab_size=50, n_embd=32, n_layer=num_layers, n_head=4, n_positions=64, n_inner=48)
        case "neox":
            sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
            return tf.GPTNeoXConfig(**sizes, num_hidden_layers=num_layers)
    raise ValueError(family)


@pytest.fixture(scope="session")
def models() -> Models:
    """A function: family, number of layers -> its random model, with gains and biases of norms that change the numbers."""
    made: dict[tuple[str, int], nn.Module] = {}

    def make(family: str, num_layers: int = 3) -> nn.Module:
        if (family, num_layers) not in made:
            torch.manual_seed(3)
            model = tf.AutoModelForCausalLM.from_config(_config(family, num_layers)).eval().requires_grad_(False)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name or ".ln_" in name:
                        parameter.add_(0.5 * torch.rand(parameter.shape) + 0.1)
                    elif name.endswith("bias"):
                        parameter.add_(0.1 * torch.randn(parameter.shape))
            made[family, num_layers] = model
        return made[family, num_layers]

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """`[2, 7]` random ids."""
    return torch.randint(2, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def hooks_left(model: nn.Module) -> list[object]:
    """Hooks of ours that are still on the model; transformers leaves some of its own."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if hook.__module__.startswith("saekit")]


def dictionary(
    site: Site,
    *,
    site_out: Site | None = None,
    d_in: int = 32,
    d_out: int = 32,
    d_sae: int = 40,
    has_skip: bool = False,
) -> Dictionary:
    """A random relu dictionary that reconstructs badly, which is what tests need."""
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    tensors = {"W_enc": draw(d_in, d_sae), "b_enc": draw(d_sae), "W_dec": draw(d_sae, d_out), "b_dec": draw(d_out)}
    if has_skip:
        tensors["W_skip"] = draw(d_in, d_out)
    cfg = DictionaryConfig(d_in=d_in, d_sae=d_sae, d_out=d_out, activation=ReLU(), site=site, site_out=site_out)
    return Dictionary(cfg, tensors, source={"units": "none"}).requires_grad_(False)
