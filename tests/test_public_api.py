"""The public surface: what `import saekit` offers, and that it costs and changes nothing."""

import json
import subprocess
import sys

import pytest

import saekit

PUBLIC = [
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


def test_public_names_are_these_and_no_others() -> None:
    assert saekit.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(saekit))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_can_be_used_and_is_documented(name: str) -> None:
    value = getattr(saekit, name)
    assert value.__name__ == name
    assert value.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TopkSAE'"):
        _ = saekit.TopkSAE  # type: ignore[attr-defined]  # that is the point


def test_import_loads_no_heavy_package_and_changes_nothing() -> None:
    program = (
        "import json, os, signal, sys\n"
        "before = dict(os.environ), sys.excepthook, signal.getsignal(signal.SIGINT)\n"
        "import saekit\n"
        "after = dict(os.environ), sys.excepthook, signal.getsignal(signal.SIGINT)\n"
        "heavy = [m for m in ('torch', 'transformers', 'zarr', 'openai', 'accelerate', 'datasets') if m in sys.modules]\n"
        "print(json.dumps([before == after, heavy]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [True, []]
