"""Trainings that are stopped, killed and gone on with, in processes of their own."""

import contextlib
import ctypes
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch

from saekit.errors import ResourceError
from saekit.sae import TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, processes
from saekit.training import trainer as trainer_module
from tests.saekit.training.planted import PlantedSource
from tests.saekit.training.ranks import join

# 60 steps of 120 tokens, which 1 to 4 processes share evenly; a checkpoint is begun in every second step.
CONFIG = TrainConfig(
    num_tokens=60 * 120,
    batch_size=120,
    lr=1e-2,
    dead_after_tokens=480,
    checkpoint_every_tokens=240,
    log_every_tokens=1200,
)
MAY_NOT_MOUNT = 77
CFG = TopKConfig(d_in=16, d_sae=32, k=2)


def train(out: Path, *, stop_after: int | None = None, kill_at: int | None = None, marker: Path | None = None) -> None:
    """Trains as the process that the environment says, and notes the tokens of every step that it did.

    Args:
        out: folder of the SAE.
        stop_after: step after which the training is asked to stop.
        kill_at: step before which the last process kills itself, once.
        marker: file that says that it did so.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer_module.SAMPLE_TOKENS = 1200
    source = PlantedSource(batch_size=120, rank=rank, world_size=world_size)
    step = trainer_module.TrainRun.train_step

    def noted(self: trainer_module.TrainRun, *, stop_asked: bool = False) -> object:
        if marker is not None and self.step == kill_at and rank == world_size - 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        position = source.position
        figures = step(self, stop_asked=stop_asked or self.step + 1 == stop_after)
        share = range(*source.share.indices(120))
        with (out / f"seen_{rank}.txt").open("a") as file:
            file.writelines(f"{position * 120 + token}\n" for token in share)
        return figures

    trainer_module.TrainRun.train_step = noted  # type: ignore[method-assign, assignment]  # in this process alone
    Trainer(build_sae(CFG), source, CONFIG).fit(out)


def run_rank(out: str, rank: int, world_size: int, port: int, stop_after: int | None) -> None:
    """One process of several that train up to a step."""
    if world_size > 1:
        join(rank, world_size, port)
    try:
        train(Path(out), stop_after=stop_after)
    except KeyboardInterrupt:
        # No clean-up of gloo's threads: the others may be gone.
        os._exit(0)
    os._exit(0)


def run_until_killed(out: str, started: str, rank: int, world_size: int, port: int) -> None:
    """One process of a training whose parent kills some or all of them; says when its steps begin."""
    torch.set_num_threads(1)
    if world_size > 1:
        join(rank, world_size, port)
    step = trainer_module.TrainRun.train_step

    def slow(self: trainer_module.TrainRun, *, stop_asked: bool = False) -> object:
        Path(started).touch()
        time.sleep(0.002)
        return step(self, stop_asked=stop_asked)

    trainer_module.TrainRun.train_step = slow  # type: ignore[method-assign, assignment]  # in this process alone
    trainer_module.SAMPLE_TOKENS = 1200
    processes.ANSWER_SECONDS = 0.2
    source = PlantedSource(batch_size=120, rank=rank, world_size=world_size)
    try:
        Trainer(build_sae(CFG), source, CONFIG).fit(Path(out))
    except (ResourceError, RuntimeError):
        # Another one was lost.
        os._exit(1)
    os._exit(0)


def run_on_a_full_disk(told: str) -> None:
    """A training whose disk fills up in its fifth step, and that is gone on with when there is room again."""
    disk = Path(told) / "disk"
    disk.mkdir()
    if not _mount(disk, num_bytes=2**20):
        os._exit(MAY_NOT_MOUNT)
    torch.set_num_threads(1)
    trainer_module.SAMPLE_TOKENS = 1200
    out, ballast = disk / "out", disk / "ballast"
    step = trainer_module.TrainRun.train_step

    def filling(self: trainer_module.TrainRun, *, stop_asked: bool = False) -> object:
        if self.step == 4:
            # The checkpoint of this step has been begun.
            while not (out / "checkpoints" / "step_00000004").exists():
                time.sleep(0.001)
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return step(self, stop_asked=stop_asked)

    trainer_module.TrainRun.train_step = filling  # type: ignore[method-assign, assignment]  # in this process alone
    try:
        Trainer(build_sae(CFG), PlantedSource(batch_size=120), CONFIG).fit(out)
    except ResourceError as error:
        names = sorted(path.name for path in (out / "checkpoints").iterdir())
        (Path(told) / "said").write_text("\n".join([str(error), *names]))
    ballast.unlink()
    trainer_module.TrainRun.train_step = step  # type: ignore[method-assign]  # as it was
    Trainer(build_sae(CFG), PlantedSource(batch_size=120), CONFIG).fit(out)
    shutil.copy(out / "sae.safetensors", told)
    os._exit(0)


def _mount(folder: Path, *, num_bytes: int) -> bool:
    """Gives this process a disk of its own; False where it may not have one."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_users, private = 0x20000, 0x10000000, 0x4000 | 0x40000
    if libc.unshare(new_mounts | (new_users if os.geteuid() else 0)):
        return False
    options = f"size={num_bytes}".encode()
    if libc.mount(None, b"/", None, private, None):
        return False
    return not libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, options)


def run_once_killed(out: str, marker: str) -> int:
    """A worker of torchrun whose last process kills itself once, in step 31."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    train(Path(out), kill_at=30, marker=Path(marker))
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def seen(out: Path) -> list[int]:
    """The tokens of all steps that processes did, sorted."""
    found = [np.loadtxt(path, dtype=np.int64) for path in out.glob("seen_*.txt")]
    return sorted(np.concatenate(found).tolist())
