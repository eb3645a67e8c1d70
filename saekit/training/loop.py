"""The loop around the steps: rows of figures, held-out evaluation, checkpoints, resume and Ctrl-C."""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.activations.source import PassingSource
from saekit.progress import Progress
from saekit.training.background import CheckpointWriter
from saekit.training.heldout import heldout_figures
from saekit.training.interrupt import StopRequest
from saekit.training.metrics import PART_FIELDS, MetricsLog, RunningMeans
from saekit.training.run import StepFigures, TrainRun
from saekit.training.shape import shape_of
from saekit.training.sharded_state import written_state
from saekit.training.timing import memory_peak, peak_flops, utilisation
from saekit.training.trackers import RunTrackers

__all__ = ["TrainingLoop"]

CHECKPOINT_TOKENS = 50_000_000


class TrainingLoop:
    """Runs a `TrainRun` to its end, from its newest checkpoint in `out` where there is one."""

    def __init__(
        self,
        run: TrainRun,
        out: Path,
        *,
        writer: CheckpointWriter,
        held_out: Tensor | None,
        progress: Progress,
        state: Mapping[str, Any] | None = None,
        trackers: RunTrackers | None = None,
    ) -> None:
        """Takes back the state of a checkpoint, where there is one.

        Args:
            run: as it starts.
            out: folder of the SAE.
            writer: of checkpoints.
            held_out: raw held-out activations; None = no figures of them.
            progress: is told what the training says.
            state: of the checkpoint to go on from.
            trackers: are told the rows of figures as well; None = none.

        Raises:
            StoreError: it belongs to other data.
        """
        config = run.config
        self.run = run
        self.out = out
        self.held_out = held_out
        self.progress = progress
        self.trackers = trackers
        self.means = RunningMeans()
        self.log_steps = config.every_steps(config.log_every_tokens, parts=200)
        self.eval_steps = config.every_steps(config.eval_every_tokens, parts=10)
        self.checkpoint_steps = config.every_steps(config.checkpoint_every_tokens, parts=5, most=CHECKPOINT_TOKENS)
        self.metrics: MetricsLog | None = None
        self._writer = writer
        self._written: Future[None] | None = None
        self._resume(state)
        self._since = (time.perf_counter(), run.step)
        self._counted = run.step
        # What was sent to measure the data belongs to no step.
        run.layout.traffic.take()
        self._peak, self._shape = peak_flops(run.layout.device), shape_of(run.cfg)
        self._shown: dict[str, float] = {}

    @property
    def is_done(self) -> bool:
        """Whether the last step is done."""
        return self.run.step >= self.run.config.num_steps

    def go(self) -> None:
        """Trains to the last step.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        """
        run, config = self.run, self.run.config
        total = config.num_steps * config.batch_size
        with StopRequest() as stop, self.progress.task("train", total, "tokens", done=run.tokens) as task:
            while not self.is_done:
                figures = self.advance(stop_asked=stop.is_set)
                task.advance(
                    config.batch_size, fvu=figures.fvu, l0=figures.l0, dead=figures.dead_fraction, **self._shown
                )
                if figures.stop_asked:
                    self.save()
                    self.wait()
                    message = (
                        f"interrupted after {run.tokens:,} tokens, checkpoint written; run the same again to go on"
                    )
                    self.progress.say(message)
                    raise KeyboardInterrupt(message)
            # Asked in the last step, when no further step hands it round: one process can still answer by itself.
            if stop.is_set and run.layout.num_processes == 1:
                self.save()
                self.wait()
                raise KeyboardInterrupt(f"interrupted after {run.tokens:,} tokens, checkpoint written")

    def advance(self, *, stop_asked: bool = False) -> StepFigures:
        """Does one step and what is due after it: rows of figures, and a checkpoint unless a process was asked to stop."""
        figures = self.run.train_step(stop_asked=stop_asked or self.has_failed_to_write)
        self._record(figures)
        source = self.run.source
        is_due = self.run.step % self.checkpoint_steps == 0
        is_due |= isinstance(source, PassingSource) and source.is_checkpoint_due
        if is_due and not self.is_done and not figures.stop_asked:
            self.save()
        return figures

    def save(self) -> None:
        """Begins to write a checkpoint of everything, by all processes together, once the one before is written.

        Raises:
            ResourceError: the one before could not be written.
        """
        before = time.perf_counter()
        self.wait()
        run = self.run
        shared = {
            "means": self.means.state_dict(),
            "metrics_position": self.metrics.position if self.metrics is not None else 0,
            "num_processes": run.layout.num_processes,
        }
        own = {"source": run.source.state_dict(), "rng": torch.get_rng_state()}
        state = written_state(run.state_dict(), run.layout, run.cfg.d_sae)
        self._written = self._writer.write(self.out, run.step, state=state, shared=shared, own=own)
        if isinstance(run.source, PassingSource):
            run.source.is_being_saved(self._written)
        run.timer.add("checkpoint", time.perf_counter() - before)

    def wait(self) -> None:
        """Waits until the last checkpoint is in place.

        Raises:
            ResourceError: it could not be written.
        """
        if self._written is not None:
            self._written.result()

    @property
    def has_failed_to_write(self) -> bool:
        """Whether a checkpoint is known not to have been written, so that the training had better stop."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def _resume(self, state: Mapping[str, Any] | None) -> None:
        run, layout = self.run, self.run.layout
        position = 0
        if state is not None:
            run.load_state_dict(state["run"])
            self.means.load_state_dict(state["means"])
            position = state["metrics_position"]
            run.source.load_state_dict(state["source"])
            torch.set_rng_state(state["rng"])
            before, now = state.get("num_processes"), layout.num_processes
            others = f", with {now} processes in place of {before}" if before not in {None, now} else ""
            self.progress.say(f"going on after {run.tokens:,} tokens{others}")
        if layout.is_main_process:
            self.metrics = MetricsLog(self.out, position=position)

    def _record(self, figures: StepFigures) -> None:
        run = self.run
        means = {"loss": figures.loss, "fvu": figures.fvu, "auxk": figures.auxiliary, "l0": figures.l0}
        self.means.add(means | {"gradient_norm": figures.gradient_norm, **figures.terms})
        if figures.resampled:
            self._write("resample", {"resampled": float(figures.resampled)})
        is_last = run.step == run.config.num_steps
        if run.step % self.log_steps == 0 or is_last:
            row = {"dead_fraction": figures.dead_fraction, "lr": figures.lr, "l0_coefficient": figures.coefficient}
            self._write("train", {**self.means.take(), **row, **self._speed(), **self._sent()})
        if self.held_out is not None and (run.step % self.eval_steps == 0 or is_last):
            before = time.perf_counter()
            with run.average.taken(), run.layout.traffic.paused():
                found = heldout_figures(run.sae, self.held_out, run.normalization, layout=run.layout, cfg=run.cfg)
            self._write("test", found)
            took = time.perf_counter() - before
            run.timer.add("evaluation", took)
            # Time spent here is not training time, as what was sent is not counted.
            self._since = (self._since[0] + took, self._since[1])

    def _speed(self) -> dict[str, float]:
        """Returns the figures of `SPEED_FIELDS` since the last row; the parts' are means over steps."""
        run = self.run
        now, (then, step) = time.perf_counter(), self._since
        steps, seconds = run.step - step, max(now - then, 1e-9)
        self._since = (now, run.step)
        parts = run.timer.take()
        row: dict[str, float] = {"tokens_per_second": steps * run.config.batch_size / seconds}
        row |= {name: parts.get(name.removeprefix("seconds_"), 0.0) / steps for name in PART_FIELDS}
        row |= {f"seconds_{name}": parts.get(name, 0.0) for name in ("evaluation", "checkpoint")}
        row["stall_fraction"] = parts.get("read", 0.0) / seconds
        self._shown = {"stall": row["stall_fraction"]}
        if self._peak is not None:
            processes = run.layout.num_processes
            row["mfu"] = utilisation(
                self._shape, run.config, seconds=seconds / steps, num_processes=processes, peak=self._peak
            )
            self._shown["mfu"] = row["mfu"]
        return row | {"memory_peak_bytes": memory_peak(run.layout.device)}

    def _sent(self) -> Mapping[str, object]:
        """Returns what this process sent in a step, on average since the last row; nothing where it is alone."""
        steps, self._counted = self.run.step - self._counted, self.run.step
        sent = {purpose: count / steps for purpose, count in self.run.layout.traffic.take().items()}
        if self.run.layout.num_processes == 1:
            return {}
        return {"bytes_per_step": sum(sent.values()), "bytes_per_step_by_purpose": sent}

    def _write(self, split: str, figures: Mapping[str, object]) -> None:
        if self.metrics is None:
            return
        row = {"split": split, "step": self.run.step, "tokens": self.run.tokens, **figures}
        self.metrics.append(row)
        if self.trackers is not None:
            self.trackers.log(self.metrics.num_rows, row)
