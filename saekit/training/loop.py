"""The loop around the steps: rows of figures, held-out evaluation, checkpoints, resume and Ctrl-C."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saekit.progress import Progress
from saekit.training.heldout import heldout_figures
from saekit.training.interrupt import StopRequest
from saekit.training.metrics import MetricsLog, RunningMeans
from saekit.training.run import StepFigures, TrainRun
from saekit.training.sharded_state import load_run, part_name
from saekit.training.state import latest_checkpoint, load_checkpoint, publish_checkpoint, write_part

__all__ = ["TrainingLoop"]

CHECKPOINT_TOKENS = 50_000_000


class TrainingLoop:
    """Runs a `TrainRun` to its end, from its newest checkpoint in `out` where there is one."""

    def __init__(self, run: TrainRun, out: Path, *, held_out: Tensor | None, progress: Progress) -> None:
        """Loads the newest checkpoint.

        Raises:
            FormatError: the checkpoint is broken.
            StoreError: it belongs to other data.
        """
        config = run.config
        self.run = run
        self.out = out
        self.held_out = held_out
        self.progress = progress
        self.means = RunningMeans()
        self.log_steps = config.every_steps(config.log_every_tokens, parts=200)
        self.eval_steps = config.every_steps(config.eval_every_tokens, parts=10)
        self.checkpoint_steps = config.every_steps(config.checkpoint_every_tokens, parts=5, most=CHECKPOINT_TOKENS)
        self.metrics: MetricsLog | None = None
        self._resume()
        self._since = (time.perf_counter(), run.step)
        self._counted = run.step
        # What was sent to measure the data belongs to no step.
        run.layout.traffic.take()

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
                task.advance(config.batch_size, fvu=figures.fvu, l0=figures.l0, dead=figures.dead_fraction)
                if figures.stop_asked:
                    self.save()
                    message = (
                        f"interrupted after {run.tokens:,} tokens, checkpoint written; run the same again to go on"
                    )
                    self.progress.say(message)
                    raise KeyboardInterrupt(message)
            # Asked in the last step, when no further step hands it round: one process can still answer by itself.
            if stop.is_set and run.layout.num_processes == 1:
                self.save()
                raise KeyboardInterrupt(f"interrupted after {run.tokens:,} tokens, checkpoint written")

    def advance(self, *, stop_asked: bool = False) -> StepFigures:
        """Does one step and what is due after it: rows of figures, and a checkpoint unless a process was asked to stop."""
        figures = self.run.train_step(stop_asked=stop_asked)
        self._record(figures)
        if self.run.step % self.checkpoint_steps == 0 and not self.is_done and not figures.stop_asked:
            self.save()
        return figures

    def save(self) -> None:
        """Writes a checkpoint of everything, by all processes together."""
        run, layout = self.run, self.run.layout
        layout.wait_for_everyone()
        if (name := part_name(layout)) is not None:
            state = {
                "run": run.state_dict(),
                "means": self.means.state_dict(),
                "metrics_position": self.metrics.position if self.metrics is not None else None,
            }
            write_part(self.out, run.step, name, state)
        own = {"source": run.source.state_dict(), "rng": torch.get_rng_state()}
        write_part(self.out, run.step, f"process_{layout.process_index}", own)
        layout.wait_for_everyone()
        if layout.is_main_process:
            publish_checkpoint(self.out, run.step)
        layout.wait_for_everyone()

    def _resume(self) -> None:
        run, layout = self.run, self.run.layout
        position = 0
        checkpoint = latest_checkpoint(self.out)
        if checkpoint is not None:
            state = load_run(checkpoint, layout, run.cfg.d_sae)
            run.load_state_dict(state["run"])
            self.means.load_state_dict(state["means"])
            position = state["metrics_position"]
            own = load_checkpoint(checkpoint, f"process_{layout.process_index}")
            run.source.load_state_dict(own["source"])
            torch.set_rng_state(own["rng"])
            self.progress.say(f"going on after {run.tokens:,} tokens")
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
            now, (then, step) = time.perf_counter(), self._since
            speed = (run.step - step) * run.config.batch_size / max(now - then, 1e-9)
            self._since = (now, run.step)
            row = {
                "dead_fraction": figures.dead_fraction,
                "lr": figures.lr,
                "l0_coefficient": figures.coefficient,
                "tokens_per_second": speed,
            }
            self._write("train", {**self.means.take(), **row, **self._sent()})
        if self.held_out is not None and (run.step % self.eval_steps == 0 or is_last):
            before = time.perf_counter()
            with run.average.taken(), run.layout.traffic.paused():
                found = heldout_figures(run.sae, self.held_out, run.normalization, layout=run.layout, cfg=run.cfg)
            self._write("test", found)
            # Time spent here is not training time, as what was sent is not counted.
            self._since = (self._since[0] + time.perf_counter() - before, self._since[1])

    def _sent(self) -> Mapping[str, object]:
        """Returns what this process sent in a step, on average since the last row; nothing where it is alone."""
        steps, self._counted = self.run.step - self._counted, self.run.step
        sent = {purpose: count / steps for purpose, count in self.run.layout.traffic.take().items()}
        if self.run.layout.num_processes == 1:
            return {}
        return {"bytes_per_step": sum(sent.values()), "bytes_per_step_by_purpose": sent}

    def _write(self, split: str, figures: Mapping[str, object]) -> None:
        if self.metrics is not None:
            self.metrics.append({"split": split, "step": self.run.step, "tokens": self.run.tokens, **figures})
