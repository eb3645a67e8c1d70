"""Tiny models, loaded once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from saekit.models import LanguageModel, load_model

FAMILIES = ("llama", "qwen2", "gpt2", "neox", "gemma2", "gemma3")
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """A function: family -> its tiny random model on the CPU."""
    loaded: dict[str, LanguageModel] = {}

    def load(family: str = "llama") -> LanguageModel:
        if family not in loaded:
            loaded[family] = load_model(str(tiny_model_dir(family)))
        return loaded[family]

    return load


@pytest.fixture(params=FAMILIES)
def lm(request: pytest.FixtureRequest, tiny: Callable[[str], LanguageModel]) -> Iterator[LanguageModel]:
    """Each family in turn; fails the test that leaves a hook behind."""
    model = tiny(request.param)
    yield model
    # transformers leaves hooks of its own behind when it is asked for hidden states.
    left = {
        name: hook
        for name, module in model.model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if hook.__module__.startswith("saekit")
    }
    assert not left


@pytest.fixture
def llama(tiny: Callable[[str], LanguageModel]) -> LanguageModel:
    """The tiny Llama."""
    return tiny("llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    """`[3, 17]` random ids."""
    return torch.randint(2, 300, (3, 17), generator=torch.Generator().manual_seed(1))


def layer_path(lm: LanguageModel, number: int) -> str:
    """Module path of a decoder layer."""
    return f"{LAYERS.get(lm.text_config.model_type, 'model.layers')}.{number}"
