"""SAEs trained on one read are those trained alone, bit for bit, whatever happens to one of them."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from saekit.activations import ActivationStore
from saekit.errors import ConfigError, NonFiniteError
from saekit.progress import NO_PROGRESS, Task
from saekit.sae import BatchTopKConfig, JumpReLUConfig, SAEConfig, TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, read_metrics, train_together
from saekit.training import finish as finish_module
from saekit.training import loop as loop_module
from saekit.training import together as together_module
from saekit.training import trainer as trainer_module
from saekit.training.fused_adam import FusedAdam
from saekit.training.memory import training_bytes
from saekit.training.metrics import SPEED_FIELDS
from saekit.training.run import TrainRun
from saekit.training.shared import SharedBatches

CONFIGS: dict[str, tuple[SAEConfig, dict[str, object]]] = {
    "topk": (TopKConfig(d_in=32, d_sae=64, k=4), {}),
    "batchtopk": (BatchTopKConfig(d_in=32, d_sae=48, k=4), {"lr": 3e-3, "ema_decay": 0.9}),
    "jumprelu": (JumpReLUConfig(d_in=32, d_sae=64, target_l0=4), {"num_tokens": 64 * 30}),
}
COMMON: dict[str, object] = {"num_tokens": 64 * 24, "batch_size": 64, "checkpoint_every_tokens": 64 * 9}


def make(store: ActivationStore, name: str, **changes: object) -> Trainer:
    train, test = store.split(0.3)
    cfg, options = CONFIGS[name]
    return Trainer(build_sae(cfg), train, TrainConfig.parse(COMMON | options | changes), test=test)


def contents(folder: Path) -> tuple[bytes, list[dict[str, object]]]:
    rows = read_metrics(folder)
    for row in rows:
        for name in SPEED_FIELDS:
            row.pop(name, None)
    return (folder / "sae.safetensors").read_bytes(), rows


@pytest.fixture(scope="module", autouse=True)
def _small_samples() -> Iterator[None]:
    """The start and the end are measured on a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer_module, finish_module):
            patch.setattr(module, "SAMPLE_TOKENS", 1024)
        yield


@pytest.fixture(scope="module")
def alone(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, object]]:
    out = tmp_path_factory.mktemp("alone")
    for name in CONFIGS:
        make(store, name).fit(out / name)
    return {name: contents(out / name) for name in CONFIGS}


class Heard:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> AbstractContextManager[Task]:
        return NO_PROGRESS.task(name, total, unit, done=done)


def test_each_sae_is_the_one_trained_alone_and_each_batch_is_read_once(
    store: ActivationStore,
    alone: dict[str, tuple[bytes, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[SharedBatches] = []

    class Noted(SharedBatches):
        def __init__(self, batches: object) -> None:
            super().__init__(batches)  # type: ignore[arg-type]  # a ShuffledBatches
            made.append(self)

    monkeypatch.setattr(together_module, "SharedBatches", Noted)
    steps: list[int] = []
    advance = loop_module.TrainingLoop.advance
    monkeypatch.setattr(
        loop_module.TrainingLoop,
        "advance",
        lambda self, **options: (steps.append(made[0].num_reads), advance(self, **options))[1],
    )
    heard = Heard()
    saes = train_together({tmp_path / name: make(store, name) for name in CONFIGS}, progress=heard)
    for name in CONFIGS:
        assert contents(tmp_path / name) == alone[name], name
        x = torch.randn(5, 32)
        assert saes[tmp_path / name](x).x_hat.shape == x.shape
    assert len(made) == 1
    # All three take 24 steps: a batch is read for each step, not for each SAE's.
    assert steps[3 * 23] - steps[0] == 23
    assert len(steps) == 24 + 24 + 30
    assert any("3 SAEs on one read of the data: about" in line and "GB are free on cpu" in line for line in heard.said)
    again = Heard()
    train_together({tmp_path / name: make(store, name) for name in CONFIGS}, progress=again)
    assert sum("already trained" in line for line in again.said) == 3


def test_stopped_trainings_go_on_each_from_where_it_was(
    store: ActivationStore,
    alone: dict[str, tuple[bytes, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = TrainRun.train_step

    def fail_late(self: TrainRun, **options: bool) -> object:
        if self.step == 13 and self.sae.d_sae == 48:
            raise RuntimeError("power cut")
        return step(self, **options)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="power cut"):
        patched.setattr(TrainRun, "train_step", fail_late)
        train_together({tmp_path / name: make(store, name) for name in CONFIGS})
    # One of them goes on alone, and is ahead of the others then.
    make(store, "topk").fit(tmp_path / "topk")
    train_together({tmp_path / name: make(store, name) for name in CONFIGS})
    for name in CONFIGS:
        assert contents(tmp_path / name) == alone[name], name


def test_interrupt_writes_a_checkpoint_of_each(
    store: ActivationStore,
    alone: dict[str, tuple[bytes, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = TrainRun.train_step

    def ask(self: TrainRun, *, stop_asked: bool = False) -> object:
        return step(self, stop_asked=stop_asked or (self.step == 10 and self.sae.d_sae == 48))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="checkpoints of 3 SAEs written"):
        patched.setattr(TrainRun, "train_step", ask)
        train_together({tmp_path / name: make(store, name) for name in CONFIGS})
    newest = {name: max(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in CONFIGS}
    assert set(newest.values()) == {"step_00000011"}
    train_together({tmp_path / name: make(store, name) for name in CONFIGS})
    for name in CONFIGS:
        assert contents(tmp_path / name) == alone[name], name


def test_one_that_fails_does_not_stop_the_others(
    store: ActivationStore,
    alone: dict[str, tuple[bytes, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = FusedAdam.step

    def poison(self: FusedAdam, closure: None = None) -> None:
        step(self, closure)
        if (
            self.param_groups[1]["params"][0].numel() == 48
            and self.state[self.param_groups[1]["params"][0]]["step"] == 5
        ):
            self.param_groups[1]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(FusedAdam, "step", poison)
    with pytest.raises(
        NonFiniteError, match=r"1 of 3 trainings failed, the others are finished: .*batchtopk: "
    ) as caught:
        train_together({tmp_path / name: make(store, name) for name in CONFIGS})
    assert "\n" not in str(caught.value)
    for name in ("topk", "jumprelu"):
        assert contents(tmp_path / name) == alone[name], name
    assert not (tmp_path / "batchtopk" / "sae.safetensors").exists()


def test_other_orders_of_the_data_are_read_apart(store: ActivationStore, tmp_path: Path) -> None:
    trainers = {
        tmp_path / "seed": make(store, "topk", seed=1),
        tmp_path / "batch": make(store, "topk", batch_size=32),
    }
    train_together(trainers)
    make(store, "topk", seed=1).fit(tmp_path / "seed-alone")
    assert contents(tmp_path / "seed") == contents(tmp_path / "seed-alone")
    with pytest.raises(ConfigError, match=r"training.seed \(1 there, 0 asked\)"):
        train_together({tmp_path / "seed": make(store, "topk")})


def test_memory_is_that_of_weights_gradients_and_moments(store: ActivationStore) -> None:
    trainer = make(store, "topk")
    numbers = 2 * 32 * 64 + 64 + 32
    tokens = 64 * 8 * 32 * 4
    assert training_bytes(trainer.sae, trainer.config) == numbers * 16 + tokens
    assert training_bytes(trainer.sae, trainer.config, num_processes=4) == numbers * 16 + tokens // 4
    small = TrainConfig.parse(COMMON | {"micro_batch_size": 16, "ema_decay": 0.9, "optimizer": "muon"})
    assert training_bytes(trainer.sae, small) == numbers * 16 + tokens // 4
