"""Trainings on a ring that are killed and gone on with: training and filling in processes of their own."""

import os
import select
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from saekit.activations import ActivationStore, RingView
from saekit.activations import filler as filler_module
from saekit.activations import fillers as fillers_module
from saekit.progress import NO_PROGRESS
from saekit.sae import TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, finish, train_together
from saekit.training import trainer as trainer_module
from tests.saekit.activations.rings import make_ring

HOOKS = ("model.layers.1", "model.layers.0:input")
PLACES = tuple(sorted((hook,) for hook in HOOKS))
BATCH = 64
STEPS = 24


class Piped:
    """A filling process that somebody else started, at the other end of a named pipe."""

    def __init__(self, pipe: Path) -> None:
        self.stdin = pipe.open("wb")

    def poll(self) -> int | None:
        ended = select.poll()
        ended.register(self.stdin, 0)
        return -9 if ended.poll(0) else None

    def wait(self, timeout: float | None = None) -> None:
        pass


def trainers(kept: Path, out: Path, *, steps: int = STEPS) -> dict[str | Path, Trainer]:
    """Two SAEs at two hook points, of which the second one is trained a little shorter."""
    ring = make_ring(kept, out / "ring", batch_size=BATCH, places=PLACES)
    made: dict[str | Path, Trainer] = {}
    for number, hook in enumerate(HOOKS):
        train, test = ActivationStore.open(kept, hook).split(0.2)
        config = TrainConfig(
            num_tokens=(steps - 6 * number) * BATCH,
            batch_size=BATCH,
            lr=1e-2,
            dead_after_tokens=512,
            # In the middle of segments, beside those at their ends.
            checkpoint_every_tokens=9 * BATCH,
            log_every_tokens=20 * BATCH,
        )
        sae = build_sae(TopKConfig(d_in=32, d_sae=48, k=4))
        made[out / str(number)] = Trainer(sae, RingView(train, ring), config, test=test)
    return made


def prepare() -> None:
    torch.set_num_threads(1)
    trainer_module.SAMPLE_TOKENS = finish.SAMPLE_TOKENS = 512


def run_training(kept: str, out: str, pipe: str, started: str) -> None:
    """Trains, with what is filled by the process at the other end of a pipe; notes the positions of every step."""
    prepare()

    def launch(environment: Mapping[str, str], log: IO[bytes]) -> Piped:
        return Piped(Path(pipe))

    fillers_module.launch = launch  # type: ignore[assignment]  # in this process alone
    step = trainer_module.TrainRun.train_step

    def slow(self: trainer_module.TrainRun, *, stop_asked: bool = False) -> object:
        Path(started).touch()
        time.sleep(0.002)
        return step(self, stop_asked=stop_asked)

    trainer_module.TrainRun.train_step = slow  # type: ignore[method-assign, assignment]  # in this process alone
    try:
        train_together(trainers(Path(kept), Path(out)), progress=NO_PROGRESS)
    except OSError as error:
        Path(started).with_suffix(".error").write_text(str(error))
        os._exit(3)
    os._exit(0)


def run_filling(pipe: str) -> None:
    """What `launch` starts, with a named pipe for its standard input."""
    torch.set_num_threads(1)
    handle = os.open(pipe, os.O_RDONLY)
    os.dup2(handle, 0)
    os.close(handle)
    sys.stdin = os.fdopen(0)
    filler_module.main()


def run_rank(kept: str, out: str, rank: int, world_size: int, port: int, pipe: str) -> None:
    """One of several processes that train one SAE."""
    from tests.saekit.training.ranks import join

    join(rank, world_size, port)
    run_training(kept, out, pipe, f"{pipe}.started")
