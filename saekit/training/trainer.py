"""The training stage: from a source of activations to a folder that holds an SAE of raw activations."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from saekit.activations.joined import PairedStore
from saekit.activations.mixing import Mixing, measure_mixing
from saekit.activations.ringbatches import RingView
from saekit.activations.shuffle import ShuffledBatches
from saekit.activations.source import ActivationSource
from saekit.activations.view import StoreView
from saekit.errors import ConfigError, NonFiniteError
from saekit.manifest import StageState, begin_stage, finish_stage, locked
from saekit.models.load import LanguageModel
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae.base import SAE
from saekit.sae.checkpoint import load_sae_folder
from saekit.sae.fold import AnyNormalization, Normalization, normalization_of_state
from saekit.sae.sites import SitesSAE
from saekit.training.background import CheckpointWriter
from saekit.training.build import check_trainable
from saekit.training.config import TrainConfig
from saekit.training.data import check_data
from saekit.training.end_to_end import EndToEndRun, check_end_to_end
from saekit.training.finish import finish_weights
from saekit.training.heldout import TokenView, read_evenly
from saekit.training.layers import each_its_own
from saekit.training.layout import Layout
from saekit.training.loop import TrainingLoop
from saekit.training.low_bit import check_low_bit
from saekit.training.options import check_options
from saekit.training.processes import checkpoint_writer, make_accelerator, watching
from saekit.training.ringed import check_ring, open_ring
from saekit.training.rows import TokenRowBatches
from saekit.training.run import TrainRun
from saekit.training.sharded import gather_sae, shard_sae
from saekit.training.sharded_state import sliced_state
from saekit.training.start import SAMPLE_TOKENS, fit_start, normalization_of, read_sample
from saekit.training.state import keep_newest, latest_checkpoint, load_process, load_run
from saekit.training.trackers import check_trackers, open_trackers

__all__ = ["Trainer"]

L0_TOLERANCE = 0.05
"""Relative distance from the target L0 on held-out tokens from which on the user is told."""


class Trainer:
    """Trains one SAE from a view of a store, or from any source of activations.

    Attributes:
        sae: what is trained; holds its final weights, for raw activations, after `fit`.
        config: how.
        train: from what.
        mixing: how many documents a batch mixes, once the training has begun; None where that is not known.
    """

    def __init__(
        self,
        sae: SAE,
        train: StoreView | ActivationSource,
        config: TrainConfig,
        *,
        test: TokenView | None = None,
        lm: LanguageModel | None = None,
    ) -> None:
        """Reads no activations yet.

        Args:
            sae: gives architecture and width; its weights too where `config.init` is "given".
            train: tokens to train on, a ring's as a `RingView`. A source of one's own gives this process's share of each batch. A
                transcoder takes pairs, those of a `PairedStore` or [N, d_in + d_out] of one's own; a dictionary of several hook points
                those of a `JoinedStore` or [N, S * d_in].
            test: held-out tokens for the figures while training, of the same rows; None = none.
            lm: the language model that the store was made with, for an objective that goes through it.

        Raises:
            ConfigError: widths differ, an SAE whose sparsity comes from a penalty has no target L0, an option means nothing to
                this kind of SAE, or an objective that goes through the model lacks the model or cannot have these data.
            StoreError: the store was made with another model.
            MissingDependencyError: the optimizer or a tracker needs a package that is not installed.
        """
        self.sae = sae
        self.config = config
        self.train = train
        self.mixing: Mixing | None = None
        self._test = test
        for what, data in (("training", train), ("test", test)):
            if data is not None:
                check_data(sae, data, data.d_in, what=what)
        check_trainable(sae)
        check_options(sae.cfg, config)
        if config.optimizer == "adamw8bit":
            check_low_bit()
        check_trackers(config.trackers)
        self._lm = lm
        if isinstance(train, RingView):
            check_ring({"training": config})
        if config.objective is not None:
            check_end_to_end(train, config.objective, lm)

    def fit(self, out: str | Path, *, progress: Progress = NO_PROGRESS) -> SAE:
        """Trains into the folder `out`; the same call again goes on where a run ended, or loads a finished one.

        The folder gets `cfg.json` and `sae.safetensors` (for raw activations), `metrics.jsonl`, `checkpoints/` and a manifest.

        Returns:
            The SAE that was passed in, with its final weights, on the CPU.

        Raises:
            ConfigError: the folder holds another run, the batch cannot be shared evenly by the processes, or a tracker cannot be
                started.
            NonFiniteError: NaN or Inf in the data, the loss or the gradients; the folder stays resumable.
            ResourceError: the folder cannot be written.
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        """
        accelerator, out = make_accelerator(), Path(out)
        layout = Layout.of(accelerator, self.config.layout)
        if self.config.layout == "layers":
            # A single SAE is one process's, and the others wait for it.
            everyone = Layout.of(accelerator, "data")
            is_mine = everyone.is_main_process
            each_its_own(everyone, partial(self._fit, out, layout, progress) if is_mine else lambda: None, [out])
        else:
            self._fit(out, layout, progress)
        return self.take(load_sae_folder(out))

    def _fit(self, out: Path, layout: Layout, progress: Progress) -> None:
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(checkpoint_writer(layout))
            loop = self.begin(out, layout, stack, writer=writer, progress=progress)
            if loop is not None:
                with self.locating(), watching(layout, out):
                    loop.go()
                    self.finish(loop)

    def begin(
        self,
        out: Path,
        layout: Layout,
        stack: contextlib.ExitStack,
        *,
        writer: CheckpointWriter,
        source: ActivationSource | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> TrainingLoop | None:
        """Claims the folder, measures the data and sets the first weights or those of the newest checkpoint.

        Args:
            out: folder of the SAE.
            layout: what this process has to do with the training.
            stack: keeps data and folder open.
            writer: of checkpoints.
            source: activations of the training tokens in their order; None = one of its own.
            progress: is told what the training says.

        Returns:
            The loop to run, None where the folder is finished.

        Raises:
            ConfigError: see `fit`.
            FormatError: the newest checkpoint is broken.
            NonFiniteError: see `fit`.
            StoreError: it belongs to other data.
        """
        own = source is None
        if source is None:
            source = self.open_source(layout, stack, progress)
        if self._claim(out, layout) == "complete":
            progress.say(f"{out}: already trained")
            return None
        if own and isinstance(source, ShuffledBatches) and layout.is_main_process:
            self.mixing = measure_mixing(source, num_batches=4)
            progress.say(str(self.mixing))
        # Taken once for all processes of a run: the others write nothing but their parts of a checkpoint.
        stack.enter_context(locked(out) if layout.is_main_process else contextlib.nullcontext())
        values = {"sae": self.sae.cfg.to_dict(), "training": self.config.identity}
        trackers = open_trackers(out, self.config, layout, stack, values=values, progress=progress)
        state = self._checkpoint(out, layout)
        with self.locating():
            run = self._start(source, layout, state["run"].get("normalization") if state else None)
        held_out = None if self._test is None else read_evenly(self._test, self.config.eval_tokens)
        return TrainingLoop(
            run, out, writer=writer, held_out=held_out, progress=progress, state=state, trackers=trackers
        )

    def finish(self, loop: TrainingLoop) -> None:
        """Writes the SAE of raw activations after the last step, and marks the folder as complete."""
        run, out, layout = loop.run, loop.out, loop.run.layout
        loop.wait()
        facts = finish_weights(run, loop.held_out)
        # Of a mesh, the first row holds all features; the others hold the same.
        sae = gather_sae(run.sae, run.cfg, layout) if layout.data.rank == 0 else run.sae
        if layout.is_main_process:
            sae.hook_point, sae.source = self._hook_point(), self._source() | facts
            sae.save(out)
            keep_newest(out, 1)
            mixing = {} if self.mixing is None else {"mixing": round(self.mixing.ratio, 3)}
            finish_stage(out, {"tokens": run.tokens, "steps": run.step, **mixing, **facts})
            if loop.trackers is not None:
                loop.trackers.close()
            self._say_fvu_by_site(sae, facts, loop.progress)
            self._say_if_l0_is_missed(facts.get("l0"), loop.progress)
        layout.wait_for_everyone()

    @contextlib.contextmanager
    def locating(self) -> Iterator[None]:
        """Inside the block, an error about NaN or Inf names the token of the store that is to blame, where one is."""
        try:
            yield
        except NonFiniteError as error:
            place = self.train.first_non_finite() if isinstance(self.train, StoreView) else None
            raise error if place is None else NonFiniteError(f"{error}; the first is in {place}") from error

    def take(self, trained: SAE) -> SAE:
        """Puts trained weights into the SAE that was passed in, and returns it."""
        self.sae.load_state_dict(trained.state_dict())
        self.sae.hook_point, self.sae.source = trained.hook_point, trained.source
        return self.sae.eval()

    def _claim(self, out: Path, layout: Layout) -> StageState:
        state: StageState | None = None
        if layout.is_main_process:
            values: dict[str, object] = {"sae": self.sae.cfg.to_dict(), "training": self.config.identity}
            inputs: dict[str, str] = {}
            if isinstance(self.train, StoreView):
                values |= {"hook_point": self.train.store.hook_point, "split": self.train.origin}
                if isinstance(self.train.store, PairedStore):
                    values["target_hook_point"] = self.train.store.targets.hook_point
                inputs |= {"cache": self.train.store.sha256, "training tokens": self.train.fingerprint}
            if isinstance(self._test, StoreView):
                inputs["held-out tokens"] = self._test.fingerprint
            state = begin_stage(out, "train", values, inputs)
        state = layout.told(state)
        assert state is not None
        return state

    def _checkpoint(self, out: Path, layout: Layout) -> dict[str, Any] | None:
        """Returns the state of the newest checkpoint, with what belongs to this process; None where there is none."""
        # One process looks, so that all go on from the same.
        checkpoint = layout.told(latest_checkpoint(out) if layout.is_main_process else None)
        if checkpoint is None:
            return None
        state = load_run(checkpoint)
        if layout.is_sharded:
            state["run"] = sliced_state(state["run"], layout.features(self.sae.d_sae))
        return state | load_process(checkpoint, layout.process_index)

    def open_source(
        self, layout: Layout, stack: contextlib.ExitStack, progress: Progress = NO_PROGRESS
    ) -> ActivationSource:
        """Returns this process's share of the training tokens, in their order.

        Raises:
            ConfigError: the batch cannot be shared evenly by the processes.
        """
        rank, world_size = layout.data.rank, layout.data.size
        share, rest = divmod(self.config.batch_size, world_size)
        if rest:
            raise ConfigError(
                f"training: batch_size {self.config.batch_size}, needs a multiple of {world_size} processes"
            )
        if not isinstance(self.train, StoreView):
            return self.train
        if isinstance(self.train, RingView):
            ring = open_ring([self.train], [self.config], layout, stack, progress)
            return ring.tap(self.train, self.config, layout)
        if self.config.objective is not None:
            return TokenRowBatches(
                self.train,
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                rank=rank,
                world_size=world_size,
            )
        return stack.enter_context(
            ShuffledBatches(
                self.train,
                batch_size=share,
                seed=self.config.seed,
                rank=rank,
                world_size=world_size,
                device=layout.device,
            )
        )

    def _start(self, source: ActivationSource, layout: Layout, measured: Mapping[str, Any] | None) -> TrainRun:
        """Measures the data and sets the first weights, of this process's features those of a single process.

        Args:
            source: of this process's tokens.
            layout: who holds other tokens and features.
            measured: the normalisation of the run that goes on, whose weights need no start; None = to be measured.
        """
        sae, cfg = copy.deepcopy(self.sae).float(), self.sae.cfg
        if measured is not None:
            return self._run(shard_sae(sae, layout), source, normalization_of_state(measured), layout)
        sample = read_sample(source, SAMPLE_TOKENS, layout)
        normalization = normalization_of(sample, self.sae)
        if self.config.init == "given":
            sae = shard_sae(sae, layout)
            normalization.unfold(sae)
        else:
            sae.reset_parameters(self.config.seed)
            sae = shard_sae(sae, layout)
            fit_start(sae, normalization.apply(sample), self.config.sparsity, layout, cfg)
        return self._run(sae, source, normalization, layout)

    def _run(self, sae: SAE, source: ActivationSource, normalization: AnyNormalization, layout: Layout) -> TrainRun:
        if isinstance(source, TokenRowBatches):
            assert self._lm is not None
            assert isinstance(normalization, Normalization)
            return EndToEndRun(sae, source, self.config, normalization=normalization, lm=self._lm, layout=layout)
        return TrainRun(sae, source, self.config, normalization=normalization, layout=layout, cfg=self.sae.cfg)

    def _say_fvu_by_site(self, sae: SAE, facts: dict[str, object], progress: Progress) -> None:
        found = facts.get("fvu_by_site")
        if isinstance(sae, SitesSAE) and isinstance(found, list):
            names = sae.hook_points or tuple(f"hook point {number}" for number in range(sae.num_sites))
            parts = ", ".join(f"{name} {fvu:.4f}" for name, fvu in zip(names, found, strict=True))
            progress.say(f"FVU on held-out tokens: {parts}")

    def _say_if_l0_is_missed(self, l0: object, progress: Progress) -> None:
        target = getattr(self.sae.cfg, "target_l0", None)
        if isinstance(target, float) and isinstance(l0, float) and abs(l0 / target - 1) > L0_TOLERANCE:
            progress.say(
                f"L0 is {l0:.4g} on held-out tokens, {abs(l0 / target - 1):.0%} from target_l0 = {target:g}: "
                f"the training was too short for its sparsity to settle; raise num_tokens"
            )

    def _hook_point(self) -> str | None:
        return self.train.store.hook_point if isinstance(self.train, StoreView) else self.sae.hook_point

    def _source(self) -> dict[str, object]:
        facts = dict(self.sae.source) | {"trained_tokens": self.config.num_steps * self.config.batch_size}
        if isinstance(self.train, StoreView):
            store = self.train.store
            facts |= {"model": store.model_name, "model_fingerprint": store.model_fingerprint, "cache": store.sha256}
            if isinstance(store, PairedStore):
                facts["target_hook_point"] = store.targets.hook_point
        return facts
