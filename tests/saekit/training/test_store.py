"""From a real cache to an SAE of its hook point."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, cache_activations
from saekit.errors import ConfigError
from saekit.hub import load_sae
from saekit.manifest import read_manifest
from saekit.models import load_model
from saekit.sae import JumpReLUConfig, SAEConfig, TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, read_metrics

HOOK_POINT = "model.layers.1"
CONFIG = TrainConfig(num_tokens=6400, batch_size=64)


@pytest.fixture(scope="module")
def store(
    tiny_model_dir: Callable[[str], Path], documents_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    config = CacheConfig.parse(
        {
            "model": {"name": str(tiny_model_dir("llama"))},
            "text": {"kind": "files", "paths": [str(documents_file)]},
            "tokens": {"context_len": 16},
            "hook_points": [HOOK_POINT],
            "num_tokens": 640,
            "dtype": "float32",
        }
    )
    out = tmp_path_factory.mktemp("store")
    return cache_activations(config, out, lm=load_model(config.model))


@pytest.mark.parametrize(
    "cfg",
    [TopKConfig(d_sae=64, k=4), JumpReLUConfig(d_sae=64, target_l0=4)],
    ids=["topk", "jumprelu"],
)
def test_sae_of_a_store_knows_where_it_belongs(store: ActivationStore, cfg: SAEConfig, tmp_path: Path) -> None:
    train, test = store.split(0.3)
    sae = Trainer(build_sae(cfg.with_d_in(store.d_in)), train, CONFIG, test=test).fit(tmp_path)
    loaded = load_sae(tmp_path)
    x = test.read(test.indices)
    assert torch.equal(loaded(x).x_hat, sae(x).x_hat)
    assert loaded.hook_point == HOOK_POINT
    assert loaded.source["model"] == store.model_name
    assert loaded.source["model_fingerprint"] == store.model_fingerprint
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.inputs == {"cache": store.sha256}
    assert manifest.config["hook_point"] == HOOK_POINT
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "train"]
    first, last = rows[0]["fvu"], rows[-1]["fvu"]
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert last < 0.5 * first


def test_sae_of_another_width_than_the_store_is_refused(store: ActivationStore) -> None:
    train, _ = store.split(0.3)
    with pytest.raises(ConfigError, match=r"training data: activations are 32 wide, needs the SAE's d_in = 48"):
        Trainer(build_sae(TopKConfig(d_in=48, d_sae=64, k=4)), train, CONFIG)
