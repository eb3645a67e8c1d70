"""Parts of a step in the metrics, and what a step waits for."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saekit.sae import (
    BatchTopKConfig,
    JumpReLUConfig,
    MatryoshkaTopKConfig,
    SAEConfig,
    TopKConfig,
    build_sae,
)
from saekit.training import TrainConfig, Trainer, read_metrics
from saekit.training.costs import step_flops
from saekit.training.hardware import find_by_device_name
from saekit.training.run import TrainRun
from saekit.training.shape import shape_of
from saekit.training.start import normalization_of
from saekit.training.timing import StepTimer, utilisation
from tests.kernels.waits import Waits

CFG = TopKConfig(d_in=16, d_sae=32, k=2)
CONFIG = TrainConfig(num_tokens=20 * 128, batch_size=128, log_every_tokens=5 * 128, checkpoint_every_tokens=8 * 128)


def test_parts_of_a_step_add_up_and_are_given_once(planted: ModuleType, tmp_path: Path) -> None:
    source = planted.PlantedSource(batch_size=128)
    Trainer(build_sae(CFG), source, CONFIG, test=planted.PlantedView(source, num_batches=2)).fit(tmp_path)
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "train"]
    assert len(rows) == 4
    for row in rows:
        parts = [float(str(row[f"seconds_{part}"])) for part in ("read", "compute", "reduce", "update")]
        step = CONFIG.batch_size / float(str(row["tokens_per_second"]))
        # Beside them a step has the loop's own work, and a clock's rounding.
        assert 0 < sum(parts) <= step * 1.001
        assert 0 < float(str(row["stall_fraction"])) < 1
    assert [float(str(row["seconds_checkpoint"])) > 0 for row in rows] == [False, True, False, True]
    timer = StepTimer(torch.device("cpu"))
    timer.add("read", 2.0)
    assert timer.take() == {"read": 2.0}
    assert timer.take() == {}


def test_utilisation_is_the_models_operations_over_the_published_rate() -> None:
    device = find_by_device_name("NVIDIA H100 80GB HBM3")
    assert device is not None
    assert device.name == "h100"
    assert find_by_device_name("NVIDIA GeForce GT 710") is None
    shape = shape_of(CFG)
    # Two operations a multiplication: with all features once; with two features, three times b and once a.
    assert step_flops(shape, CONFIG) == 2 * 128 * (16 * 32 + 2 * 4 * 16)
    one = utilisation(shape, CONFIG, seconds=1e-3, num_processes=1, peak=1e9)
    assert one == pytest.approx(step_flops(shape, CONFIG) / 1e6)
    assert utilisation(shape, CONFIG, seconds=1e-3, num_processes=4, peak=1e9) == pytest.approx(one / 4)


@pytest.mark.parametrize(
    ("cfg", "entries"),
    [
        (MatryoshkaTopKConfig(d_in=16, d_sae=24, k=2), 0),
        (BatchTopKConfig(d_in=16, d_sae=24, k=2), 1),
        (JumpReLUConfig(d_in=16, d_sae=24, target_l0=2), 1),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_steps_ask_the_device_for_numbers_of_entries_alone(
    planted: ModuleType, monkeypatch: pytest.MonkeyPatch, cfg: SAEConfig, entries: int
) -> None:
    """On the CPU, through the kernels of a GPU; the copy of a step's figures is no operator of torch's."""
    pytest.importorskip("triton")
    monkeypatch.setenv("SAEKIT_KERNELS", "triton")
    # Indices are checked on the CPU alone.
    monkeypatch.setattr(importlib.import_module("saekit_kernels.decode"), "_check_code", lambda *operands: None)
    source = planted.PlantedSource(batch_size=16)
    sae = build_sae(cfg)
    config = TrainConfig(num_tokens=20 * 16, batch_size=16, lr=1e-2, dead_after_tokens=16)
    run = TrainRun(sae, source, config, normalization=normalization_of(source.batch(7), sae))
    run.sae.b_enc.data[:3] = -1e6
    run.train_step()
    assert run.dead.num_dead >= 3
    with Waits() as waits:
        run.train_step()
    # Adam's numbers of steps lie in the host's memory, one of each parameter.
    assert waits.names == ["aten._local_scalar_dense.default"] * (len(run.parameters) + entries)


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_device(planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the device to be done with all that it was given is an error of torch's own watch."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    step, watched_steps = TrainRun.train_step, 0

    def watched(self: TrainRun, *, stop_asked: bool = False) -> object:
        nonlocal watched_steps
        # The first step compiles and sets up.
        torch.cuda.set_sync_debug_mode("error" if self.step else "default")
        watched_steps += self.step > 0
        try:
            return step(self, stop_asked=stop_asked)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TrainRun, "train_step", watched)
    Trainer(build_sae(CFG), planted.PlantedSource(batch_size=128), CONFIG).fit(tmp_path)
    assert watched_steps == CONFIG.num_steps - 1
