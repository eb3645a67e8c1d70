"""From a real cache to an SAE of its hook point."""

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from saekit.activations import ActivationStore, StoreView
from saekit.errors import ConfigError, ResourceError
from saekit.hub import load_sae
from saekit.manifest import locked, read_manifest
from saekit.progress import NO_PROGRESS, Task
from saekit.sae import JumpReLUConfig, SAEConfig, TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, read_metrics

HOOK_POINT = "model.layers.1"
CONFIG = TrainConfig(num_tokens=6400, batch_size=64)


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
    assert manifest.inputs == {
        "cache": store.sha256,
        "training tokens": train.fingerprint,
        "held-out tokens": test.fingerprint,
    }
    assert manifest.config["hook_point"] == HOOK_POINT
    assert manifest.config["split"] == {"test_fraction": 0.3, "seed": 0}
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "train"]
    first, last = rows[0]["fvu"], rows[-1]["fvu"]
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert last < 0.5 * first


def test_a_folder_trained_on_other_documents_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    config = TrainConfig(num_tokens=256, batch_size=64)
    sae = build_sae(TopKConfig(d_in=store.d_in, d_sae=64, k=4))
    train, test = store.split(0.3)
    Trainer(sae, train, config, test=test).fit(tmp_path)
    other_train, other_test = store.split(0.3, seed=1)
    with pytest.raises(ConfigError, match=r"split.seed \(0 there, 1 asked\)"):
        Trainer(sae, other_train, config, test=other_test).fit(tmp_path)
    swapped = StoreView(store, test.mask, origin=train.origin)
    with pytest.raises(ConfigError, match=r"input training tokens has changed"):
        Trainer(sae, swapped, config, test=test).fit(tmp_path)


def test_nan_in_a_store_is_named_by_row_and_shard(store: ActivationStore, tmp_path: Path) -> None:
    train, _ = store.split(0.3)
    bad = int(train.indices[7])
    read = store.read_tokens

    class Poisoned(StoreView):
        def read(self, flat: npt.NDArray[np.int64]) -> torch.Tensor:
            x = read(flat).float()
            x[torch.from_numpy(flat == bad)] = torch.nan
            return x

    view = Poisoned(store, train.mask)
    row, position = divmod(bad, store.context_len)
    assert view.first_non_finite() == f"row {row}, position {position} of shard {store.shard_of(row)}"
    assert train.first_non_finite() is None


def test_two_trainings_into_one_folder_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    train, _ = store.split(0.3)
    trainer = Trainer(build_sae(TopKConfig(d_in=store.d_in, d_sae=64, k=4)), train, CONFIG)
    with locked(tmp_path), pytest.raises(ResourceError, match="another process is writing there"):
        trainer.fit(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


class _Heard:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> AbstractContextManager[Task]:
        return NO_PROGRESS.task(name, total, unit, done=done)


def test_l0_that_misses_its_target_is_said(store: ActivationStore, tmp_path: Path) -> None:
    train, test = store.split(0.3)
    heard = _Heard()
    sae = build_sae(JumpReLUConfig(d_in=store.d_in, d_sae=64, target_l0=4))
    # Two steps: the thresholds have no time to come down from their start at twice the target.
    Trainer(sae, train, TrainConfig(num_tokens=128, batch_size=64), test=test).fit(tmp_path, progress=heard)
    assert any("from target_l0 = 4" in message and "raise num_tokens" in message for message in heard.said)


def test_sae_of_another_width_than_the_store_is_refused(store: ActivationStore) -> None:
    train, _ = store.split(0.3)
    with pytest.raises(ConfigError, match=r"training data: activations are 32 wide, needs the SAE's d_in = 48"):
        Trainer(build_sae(TopKConfig(d_in=48, d_sae=64, k=4)), train, CONFIG)
