"""Trainings that are stopped, killed and gone on with, in processes of their own."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from saekit.sae import TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer
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


def run_until_killed(out: str, started: str) -> None:
    """A training whose parent kills it; says when its steps begin."""
    torch.set_num_threads(1)
    step = trainer_module.TrainRun.train_step

    def slow(self: trainer_module.TrainRun, *, stop_asked: bool = False) -> object:
        Path(started).touch()
        time.sleep(0.002)
        return step(self, stop_asked=stop_asked)

    trainer_module.TrainRun.train_step = slow  # type: ignore[method-assign, assignment]  # in this process alone
    trainer_module.SAMPLE_TOKENS = 1200
    source = PlantedSource(batch_size=120)
    Trainer(build_sae(CFG), source, CONFIG).fit(Path(out))
    os._exit(0)


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
