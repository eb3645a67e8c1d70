"""Sparse dictionaries of language models: cache activations, train SAEs, label, evaluate and browse their features.

Names are loaded on first use, so that `import saekit` costs nothing and changes nothing in the process.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saekit.activations import ActivationStore, CacheConfig, JoinedStore, PairedStore, StoreView, cache_activations
    from saekit.errors import SaekitError
    from saekit.evaluation import EvaluationConfig, evaluate
    from saekit.hub import load_sae, load_saes, save_sae
    from saekit.labelling import LabelConfig, compare_labels, label_features
    from saekit.models import LanguageModel, ModelConfig, load_model
    from saekit.report import build_report
    from saekit.sae import (
        MLSAE,
        SAE,
        BatchTopKConfig,
        BatchTopKCrosscoder,
        BatchTopKCrosscoderConfig,
        BatchTopKSAE,
        Dictionary,
        GatedConfig,
        GatedSAE,
        JumpReLUConfig,
        JumpReLUSAE,
        MatryoshkaBatchTopKConfig,
        MatryoshkaBatchTopKSAE,
        MatryoshkaTopKConfig,
        MatryoshkaTopKSAE,
        MLSAEConfig,
        MultiLayerDictionary,
        ReLUConfig,
        ReLUCrosscoder,
        ReLUCrosscoderConfig,
        ReLUSAE,
        SAEOutput,
        TopKConfig,
        TopKCrosscoder,
        TopKCrosscoderConfig,
        TopKSAE,
        Transcoder,
        TranscoderConfig,
    )
    from saekit.splice import Attached, attach, capture
    from saekit.training import TrainConfig, Trainer, train_together

__version__ = "0.1.0"

_HOMES = {
    "saekit.activations": (
        "ActivationStore",
        "CacheConfig",
        "JoinedStore",
        "PairedStore",
        "StoreView",
        "cache_activations",
    ),
    "saekit.errors": ("SaekitError",),
    "saekit.evaluation": ("EvaluationConfig", "evaluate"),
    "saekit.hub": ("load_sae", "load_saes", "save_sae"),
    "saekit.labelling": ("LabelConfig", "compare_labels", "label_features"),
    "saekit.models": ("LanguageModel", "ModelConfig", "load_model"),
    "saekit.report": ("build_report",),
    "saekit.sae": (
        "SAE",
        "BatchTopKConfig",
        "BatchTopKCrosscoder",
        "BatchTopKCrosscoderConfig",
        "BatchTopKSAE",
        "GatedConfig",
        "GatedSAE",
        "JumpReLUConfig",
        "JumpReLUSAE",
        "MatryoshkaBatchTopKConfig",
        "MatryoshkaBatchTopKSAE",
        "MatryoshkaTopKConfig",
        "MatryoshkaTopKSAE",
        "MLSAE",
        "MLSAEConfig",
        "ReLUConfig",
        "ReLUCrosscoder",
        "ReLUCrosscoderConfig",
        "ReLUSAE",
        "SAEOutput",
        "TopKConfig",
        "TopKCrosscoder",
        "TopKCrosscoderConfig",
        "TopKSAE",
        "Transcoder",
        "TranscoderConfig",
        "Dictionary",
        "MultiLayerDictionary",
    ),
    "saekit.splice": ("Attached", "attach", "capture"),
    "saekit.training": ("TrainConfig", "Trainer", "train_together"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MLSAE",
    "SAE",
    "ActivationStore",
    "Attached",
    "BatchTopKConfig",
    "BatchTopKCrosscoder",
    "BatchTopKCrosscoderConfig",
    "BatchTopKSAE",
    "CacheConfig",
    "Dictionary",
    "EvaluationConfig",
    "GatedConfig",
    "GatedSAE",
    "JoinedStore",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "LabelConfig",
    "LanguageModel",
    "MLSAEConfig",
    "MatryoshkaBatchTopKConfig",
    "MatryoshkaBatchTopKSAE",
    "MatryoshkaTopKConfig",
    "MatryoshkaTopKSAE",
    "ModelConfig",
    "MultiLayerDictionary",
    "PairedStore",
    "ReLUConfig",
    "ReLUCrosscoder",
    "ReLUCrosscoderConfig",
    "ReLUSAE",
    "SAEOutput",
    "SaekitError",
    "StoreView",
    "TopKConfig",
    "TopKCrosscoder",
    "TopKCrosscoderConfig",
    "TopKSAE",
    "TrainConfig",
    "Trainer",
    "Transcoder",
    "TranscoderConfig",
    "attach",
    "build_report",
    "cache_activations",
    "capture",
    "compare_labels",
    "evaluate",
    "label_features",
    "load_model",
    "load_sae",
    "load_saes",
    "save_sae",
    "train_together",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'saekit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
