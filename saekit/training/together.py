"""Several SAEs trained in step on one read of a store, each to the same bits as alone."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from saekit.activations.mixing import measure_mixing
from saekit.activations.ringbatches import RingView
from saekit.activations.shuffle import ShuffledBatches
from saekit.activations.view import StoreView
from saekit.errors import NonFiniteError
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae.base import SAE
from saekit.sae.checkpoint import load_sae_folder
from saekit.training.config import TrainConfig
from saekit.training.interrupt import StopRequest
from saekit.training.layers import each_its_own, shares
from saekit.training.layout import Layout
from saekit.training.loop import TrainingLoop
from saekit.training.memory import free_bytes, training_bytes
from saekit.training.processes import checkpoint_writer, make_accelerator, watching
from saekit.training.ringed import RingTap, SharedRing, check_ring, open_ring
from saekit.training.shared import SharedBatches, Tap
from saekit.training.trackers import check_single_runs
from saekit.training.trainer import Trainer

__all__ = ["train_together"]


def train_together(trainers: Mapping[str | Path, Trainer], *, progress: Progress = NO_PROGRESS) -> dict[Path, SAE]:
    """Trains SAEs into a folder each; those that read the same tokens in the same order take every batch from one read.

    That is so for the same view of a store, batch size and seed. The others are trained one after another. The same call again
    goes on where each of them ended, also where some were trained alone. With the layout `layers` every process takes some of
    them.

    Args:
        trainers: folder -> trainer.
        progress: is told the memory that is needed, and how far the trainings are.

    Returns:
        Folder -> SAE with its final weights, on the CPU.

    Raises:
        NonFiniteError: some of them met NaN or Inf; all others are finished.
        ConfigError: a tracker takes one run at a time, and several trainings take the same batches.
        ConfigError, ResourceError, KeyboardInterrupt: as `Trainer.fit`; the folders stay resumable.
    """
    rings: dict[str, dict[str, TrainConfig]] = {}
    for folder, trainer in trainers.items():
        if isinstance(trainer.train, RingView):
            rings.setdefault(trainer.train.ring.identity, {})[str(folder)] = trainer.config
    for configs in rings.values():
        check_ring(configs)
    accelerator = make_accelerator()
    layers = {Path(folder): trainer for folder, trainer in trainers.items() if trainer.config.layout == "layers"}
    others = {Path(folder): trainer for folder, trainer in trainers.items() if Path(folder) not in layers}
    for group in (*_groups(layers).values(), *_groups(others).values()):
        check_single_runs(trainer.config for trainer in group.values())
    failed: dict[Path, str] = {}
    if layers:
        everyone, own = Layout.of(accelerator, "data"), Layout.alone(accelerator.device)
        costs = {
            folder: float(trainer.sae.W_enc.numel()) * t.num_tokens
            for folder, trainer in layers.items()
            for t in (trainer.config,)
        }
        mine = shares(costs, everyone.num_processes)[everyone.process_index]
        train = partial(_train_groups, {folder: layers[folder] for folder in layers if folder in mine}, own, progress)
        for found in each_its_own(everyone, train, list(layers)):
            failed |= found
    for layout in dict.fromkeys(trainer.config.layout for trainer in others.values()):
        those = {folder: trainer for folder, trainer in others.items() if trainer.config.layout == layout}
        failed |= _train_groups(those, Layout.of(accelerator, layout), progress)
    if failed:
        shown = "; ".join(f"{folder}: {error}" for folder, error in failed.items())
        raise NonFiniteError(f"{len(failed)} of {len(trainers)} trainings failed, the others are finished: {shown}")
    return {Path(folder): trainer.take(load_sae_folder(Path(folder))) for folder, trainer in trainers.items()}


def _train_groups(trainers: Mapping[Path, Trainer], layout: Layout, progress: Progress) -> dict[Path, str]:
    """Trains SAEs group by group; returns folder -> why, of those that met NaN or Inf."""
    failed: dict[Path, NonFiniteError] = {}
    for group in _groups(trainers).values():
        _Group(group, layout, progress).train(failed)
    return {folder: str(error) for folder, error in failed.items()}


def _groups(trainers: Mapping[Path, Trainer]) -> dict[object, dict[Path, Trainer]]:
    """Returns the trainings of each order of batches."""
    groups: dict[object, dict[Path, Trainer]] = {}
    for folder, trainer in trainers.items():
        groups.setdefault(_order_of(trainer), {})[folder] = trainer
    return groups


def _order_of(trainer: Trainer) -> object:
    """What trainings have to have in common to take the same batches; whole rows and sources of one's own are not shared."""
    view = trainer.train
    if isinstance(view, RingView):
        return view.ring.identity
    if not isinstance(view, StoreView) or trainer.config.objective is not None:
        return trainer
    # A store's text names all of its hook points, also where it joins several.
    return view.store.sha256, repr(view.store), view.fingerprint, trainer.config.batch_size, trainer.config.seed


def _drop(loops: dict[Path, TrainingLoop], folder: Path) -> None:
    loop = loops.pop(folder)
    if isinstance(loop.run.source, RingTap):
        loop.run.source.leave()


@dataclass(frozen=True)
class _Group:
    """Trainings that read the same batches."""

    trainers: Mapping[Path, Trainer]
    layout: Layout
    progress: Progress

    def train(self, failed: dict[Path, NonFiniteError]) -> None:
        """Trains all to their end; adds those that met NaN or Inf to `failed`."""
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(checkpoint_writer(self.layout))
            shared = self._open(stack)
            self._say_memory()
            loops: dict[Path, TrainingLoop] = {}
            for folder, trainer in self.trainers.items():
                source = self._tap(shared, trainer)
                try:
                    loop = trainer.begin(
                        folder, self.layout, stack, writer=writer, source=source, progress=self.progress
                    )
                except NonFiniteError as error:
                    failed[folder] = error
                    loop = None
                if loop is not None:
                    loops[folder] = loop
                elif isinstance(source, RingTap):
                    source.leave()
            with watching(self.layout, *loops):
                self._run(loops, failed)

    def _open(self, stack: contextlib.ExitStack) -> SharedBatches | SharedRing | None:
        first = next(iter(self.trainers.values()))
        rings = [trainer.train for trainer in self.trainers.values() if isinstance(trainer.train, RingView)]
        if rings:
            configs = [trainer.config for trainer in self.trainers.values()]
            return open_ring(rings, configs, self.layout, stack, self.progress)
        if not isinstance(first.train, StoreView) or first.config.objective is not None:
            return None
        batches = first.open_source(self.layout, stack)
        assert isinstance(batches, ShuffledBatches)
        if self.layout.is_main_process:
            mixing = measure_mixing(batches, num_batches=4)
            self.progress.say(str(mixing))
            for trainer in self.trainers.values():
                trainer.mixing = mixing
        return SharedBatches(batches)

    def _tap(self, shared: SharedBatches | SharedRing | None, trainer: Trainer) -> Tap | RingTap | None:
        if isinstance(shared, SharedRing):
            assert isinstance(trainer.train, RingView)
            return shared.tap(trainer.train, trainer.config, self.layout)
        return None if shared is None else Tap(shared)

    def _say_memory(self) -> None:
        device = self.layout.device
        needed = sum(
            training_bytes(t.sae, t.config, num_processes=self.layout.data.size, parts=self.layout.latents.size)
            for t in self.trainers.values()
        )
        free = free_bytes(device)
        than = ", more than is free: train fewer at a time" if needed > free else ""
        self.progress.say(
            f"{len(self.trainers)} SAEs on one read of the data: about {needed / 1e9:.2g} GB for weights, gradients and"
            f" optimizers beside the data, {free / 1e9:.2g} GB are free on {device}{than}"
        )

    def _run(self, loops: dict[Path, TrainingLoop], failed: dict[Path, NonFiniteError]) -> None:
        total = sum(t.config.num_steps * t.config.batch_size for t in self.trainers.values())
        left = sum((loop.run.config.num_steps - loop.run.step) * loop.run.config.batch_size for loop in loops.values())
        with StopRequest() as stop, self.progress.task("train together", total, "tokens", done=total - left) as task:
            while loops:
                # Those that are behind first: after a resume they catch up, and then all take each batch in turn.
                step = min(loop.run.step for loop in loops.values())
                is_stopped = False
                for folder, loop in [item for item in loops.items() if item[1].run.step == step]:
                    try:
                        with self.trainers[folder].locating():
                            if loop.is_done:
                                self.trainers[folder].finish(loop)
                                _drop(loops, folder)
                                continue
                            figures = loop.advance(stop_asked=stop.is_set)
                    except NonFiniteError as error:
                        failed[folder] = error
                        _drop(loops, folder)
                        self.progress.say(f"{folder}: failed, the others go on: {error}")
                        continue
                    task.advance(loop.run.config.batch_size, fvu=figures.fvu, saes=float(len(loops)))
                    is_stopped |= figures.stop_asked
                if is_stopped:
                    self._stop(list(loops.values()))

    def _stop(self, loops: Sequence[TrainingLoop]) -> None:
        for loop in loops:
            loop.save()
        for loop in loops:
            loop.wait()
        message = f"interrupted, checkpoints of {len(loops)} SAEs written; run the same again to go on"
        self.progress.say(message)
        raise KeyboardInterrupt(message)
