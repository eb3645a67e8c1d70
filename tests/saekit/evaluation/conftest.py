"""Small caches of random models, shared by the tests of this room."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saekit.activations.collect import cache_activations
from saekit.activations.config import CacheConfig
from saekit.activations.store import ActivationStore
from saekit.models import LanguageModel, load_model
from saekit.sae import SAE, TopKConfig, TopKSAE

_HOOK_POINTS = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}


@pytest.fixture(scope="session")
def tiny_lm(tiny_model_dir: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """A function: family -> tiny model, its weights scaled up so that what it reads changes what it predicts."""
    made: dict[str, LanguageModel] = {}

    def make(family: str = "llama") -> LanguageModel:
        if family not in made:
            lm = load_model(str(tiny_model_dir(family)))
            with torch.no_grad():
                for parameter in lm.model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(6.0)
            made[family] = lm
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_store(
    tiny_lm: Callable[[str], LanguageModel], documents_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., ActivationStore]:
    """A function: family -> store of about 500 tokens in rows of 16, with some tokens marked massive."""
    made: dict[tuple[str, str, str], ActivationStore] = {}

    def make(family: str = "llama", *, packing: str = "pack", separator: str = "eos") -> ActivationStore:
        if (family, packing, separator) not in made:
            lm = tiny_lm(family)
            config = CacheConfig.parse(
                {
                    "model": {"name": lm.name},
                    "text": {"kind": "files", "paths": [str(documents_file)]},
                    "tokens": {"context_len": 16, "packing": packing, "separator": separator},
                    "hook_points": [_HOOK_POINTS[family]],
                    "num_tokens": 600,
                    "dtype": "float32",
                    # Norms of a random model are nearly equal: this marks a few percent of the tokens.
                    "massive_factor": 1.2,
                }
            )
            made[family, packing, separator] = cache_activations(
                config, tmp_path_factory.mktemp(f"cache-{family}"), lm=lm
            )
        return made[family, packing, separator]

    return make


@pytest.fixture
def tiny_sae() -> SAE:
    """A random TopK SAE for width 32."""
    return TopKSAE(TopKConfig(d_in=32, d_sae=48, k=5), seed=1)
