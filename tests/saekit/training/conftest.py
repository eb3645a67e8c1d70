"""A planted dictionary, reachable as a module by every test here, and small caches of random models."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, cache_activations
from saekit.models import LanguageModel, load_model


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted", Path(__file__).parent / "planted.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """tests/saekit/training/planted.py."""
    return _load()


@pytest.fixture(scope="session")
def store(
    tiny_model_dir: Callable[[str], Path], documents_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """640 tokens in rows of 16 at the second layer of a tiny Llama."""
    config = CacheConfig.parse(
        {
            "model": {"name": str(tiny_model_dir("llama"))},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 16},
            "hook_points": ["model.layers.1"],
            "num_tokens": 640,
            "dtype": "float32",
        }
    )
    out = tmp_path_factory.mktemp("store")
    return cache_activations(config, out, lm=load_model(config.model))


@pytest.fixture(scope="module")
def lm(tiny_model_dir: Callable[[str], Path]) -> LanguageModel:
    """A tiny Llama, its weights scaled up so that what it reads changes what it predicts."""
    lm = load_model(str(tiny_model_dir("llama")))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return lm


@pytest.fixture(scope="module")
def padded(lm: LanguageModel, documents_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows of one document each, padded, at the middle layer and at its MLP."""
    config = CacheConfig.parse(
        {
            "model": {"name": lm.name},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 24, "packing": "per_document"},
            "hook_points": ["model.layers.1", "model.layers.1.mlp"],
            "num_tokens": 600,
            "dtype": "float32",
        }
    )
    folder = tmp_path_factory.mktemp("padded")
    cache_activations(config, folder, lm=lm)
    return ActivationStore.open(folder, "model.layers.1")
