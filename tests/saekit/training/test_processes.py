"""Two processes that share every batch train the same SAE as one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saekit.errors import ConfigError
from saekit.sae import (
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaTopKConfig,
    MLSAEConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    TopKCrosscoderConfig,
    build_sae,
    load_sae_folder,
)
from saekit.training import TrainConfig, Trainer, read_metrics
from saekit.training.state import latest_checkpoint, load_checkpoint

CONFIG = TrainConfig(
    num_tokens=40 * 128,
    batch_size=128,
    lr=1e-3,
    dead_after_tokens=1024,
    log_every_tokens=128,
    checkpoint_every_tokens=15 * 128,
)
CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_in=16, d_sae=32, k=2),
    "matryoshka": MatryoshkaTopKConfig(d_in=16, d_sae=32, k=2),
    "jumprelu": JumpReLUConfig(d_in=16, d_sae=32, target_l0=2),
    "relu": ReLUConfig(d_in=16, d_sae=32, target_l0=2, p_end=0.5),
    "gated": GatedConfig(d_in=16, d_sae=32, target_l0=2),
    "crosscoder": TopKCrosscoderConfig(d_in=8, num_sites=2, d_sae=32, k=2),
    "mlsae": MLSAEConfig(d_in=8, num_sites=2, d_sae=32, k=2),
}
CONFIGS["resampled"] = TopKConfig(d_in=16, d_sae=64, k=1)
EXACT = {"topk", "matryoshka", "crosscoder", "mlsae", "resampled"}
RESAMPLE = {"every_tokens": 8 * 128, "silent_tokens": 4 * 128, "sample_tokens": 1024, "encoder_norm": 1.0}


def train(planted: ModuleType, kind: str, out: Path, *, rank: int = 0, world_size: int = 1) -> None:
    source = planted.PlantedSource(batch_size=128, rank=rank, world_size=world_size)
    view = planted.PlantedView(source, num_batches=4)
    config = TrainConfig.parse(CONFIG.to_dict() | ({"resample": RESAMPLE} if kind == "resampled" else {}))
    Trainer(build_sae(CONFIGS[kind]), source, config, test=view).fit(out)


def train_until_one_is_killed(planted: ModuleType, out: Path, *, rank: int) -> None:
    """The second process is killed in its 33rd step; the checkpoint of step 30 was begun when that of step 15 was in place."""
    source = planted.PlantedSource(batch_size=128, rank=rank, world_size=2)
    if rank == 1:
        # The start reads 16,384 tokens of each process first, and comes back.
        source.kill_at, source.armed_after = 32, 16_384 // 64
    Trainer(build_sae(CONFIGS["topk"]), source, CONFIG).fit(out)


SCRIPT = """
import importlib.util, sys, torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, {here!r})
import planted
spec = importlib.util.spec_from_file_location("test_processes", {here!r} + "/test_processes.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for kind in module.CONFIGS:
    module.train(planted, kind, Path({out!r}) / kind, rank={rank}, world_size=2)
module.train_until_one_is_killed(planted, Path({out!r}) / "killed", rank={rank})
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, port, here = tmp_path_factory.mktemp("two"), free_port(), str(Path(__file__).parent)
    root = Path(__file__).parents[3]
    running = []
    for rank in (0, 1):
        environment = os.environ | {
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        script = SCRIPT.format(here=here, out=str(out), rank=rank)
        running.append(
            subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
        )
    for rank, process in enumerate(running):
        try:
            _, errors = process.communicate(timeout=300)
        finally:
            process.kill()
        # The first process loses the second one, and says so.
        assert process.returncode == (-signal.SIGKILL if rank else 1), errors
        if rank == 0:
            message = "training: process 0 of 2 lost process 1 was killed, or does not answer (connection closed)"
            assert message in errors.splitlines()[-1]
    return out


@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_equal_one(planted: ModuleType, two_processes: Path, tmp_path: Path, kind: str) -> None:
    train(planted, kind, tmp_path)
    rows, expected = read_metrics(two_processes / kind), read_metrics(tmp_path)
    assert len(rows) == len(expected)
    # Thresholds start at the mean of both processes' quantiles, which is not the quantile of both.
    tolerance = 1e-4 if kind in EXACT else 0.05
    assert ("resample" in {row["split"] for row in rows}) == (kind == "resampled")
    for row, other in zip(rows, expected, strict=True):
        for key in ("tokens", "split"):
            assert row[key] == other[key]
        for key in row.keys() & {"fvu", "l0", "dead_fraction", "gradient_norm", "resampled"}:
            assert row[key] == pytest.approx(other[key], rel=tolerance, abs=0.0 if kind in EXACT else 0.1), row
    if kind in EXACT:
        found, single = load_sae_folder(two_processes / kind), load_sae_folder(tmp_path)
        for name, value in found.named_parameters():
            torch.testing.assert_close(value, single.get_parameter(name), atol=2e-4, rtol=1e-3)


def test_checkpoint_has_a_part_of_each_process(two_processes: Path) -> None:
    (checkpoint,) = (two_processes / "topk" / "checkpoints").iterdir()
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "process_0.pt",
        "process_1.pt",
        "run.pt",
    ]


def test_a_process_that_is_killed_leaves_a_checkpoint_that_one_process_goes_on_from(
    planted: ModuleType, two_processes: Path, tmp_path: Path
) -> None:
    folder = two_processes / "killed"
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.name in {"step_00000015", "step_00000030"}
    step = load_checkpoint(checkpoint, "run")["run"]["step"]
    assert load_checkpoint(checkpoint, "process_1")["source"] == {"position": step}
    for out in (folder, tmp_path):
        Trainer(build_sae(CONFIGS["topk"]), planted.PlantedSource(batch_size=128), CONFIG).fit(out)
    found, single = load_sae_folder(folder), load_sae_folder(tmp_path)
    for name, value in found.named_parameters():
        torch.testing.assert_close(value, single.get_parameter(name), atol=2e-4, rtol=1e-3)


def test_batch_that_cannot_be_shared_is_refused(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ConfigError, match="batch_size 128, needs a multiple of 3 processes"):
        train(planted, "topk", tmp_path)
    assert not list(tmp_path.iterdir())
