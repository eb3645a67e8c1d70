"""The stages of a recipe: each reads artifact folders and writes one; finished ones are skipped, broken-off ones resumed."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from saekit.activations import ActivationStore, JoinedStore, PairedStore, StoreView, cache_activations
from saekit.activations.location import attach
from saekit.errors import ConfigError, SaekitError
from saekit.evaluation import Evaluation, EvaluationTable, evaluate, read_evaluation, summary_table
from saekit.hub import load_sae
from saekit.labelling import estimate_labels, label_features
from saekit.manifest import check_same_config, manifest_sha256, read_manifest, write_json
from saekit.models import LanguageModel, load_model
from saekit.progress import NO_PROGRESS, Progress
from saekit.report import ReportRun, build_report
from saekit.sae import SAE, build_sae
from saekit.training import Trainer, train_together
from saekit_pipelines.described import describe_ring, describe_stage
from saekit_pipelines.fronts import write_fronts
from saekit_pipelines.named import NamedProgress
from saekit_pipelines.randomised import randomised_plan, run_randomised
from saekit_pipelines.recipe import Recipe, load_recipe
from saekit_pipelines.ringing import finish_ring, on_ring
from saekit_pipelines.widths import check_width, sized, taken_from_store

__all__ = ["RUN_NAME", "Pipeline"]

RUN_NAME = "run.json"
"""Written when the last stage is done: the recipe and what each stage's folder then held."""


class Pipeline:
    """One recipe, bound to its folder; each finished stage is told to `progress` in one line."""

    def __init__(self, recipe: Recipe, *, progress: Progress = NO_PROGRESS) -> None:
        self.recipe = recipe
        self.progress = progress

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), *, progress: Progress = NO_PROGRESS) -> "Pipeline":
        """Reads a recipe and its `key=value` overrides."""
        return cls(load_recipe(path, overrides), progress=progress)

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.recipe.folder

    def stage_folder(self, stage: str, name: str | None = None) -> Path:
        """Returns the folder of a stage: `<out>/<stage>` or, per SAE, `<out>/<stage>/<name>`."""
        return self.folder / stage / name if name else self.folder / stage

    def _cache_folder(self) -> Path:
        return attach(self.stage_folder("cache"), self.recipe.storage)

    @cached_property
    def lm(self) -> LanguageModel:
        """The language model, loaded when a stage first needs it."""
        return load_model(self.recipe.cache.model)

    def store(self, name: str) -> ActivationStore:
        """Returns the finished activation store at the hook point of the SAE called `name`.

        It is one of pairs for a transcoder, and joined where the SAE has several hook points.

        Raises:
            ConfigError: it was cached with other values than the recipe has now.
        """
        self._check_cached()
        folder, target = self._cache_folder(), self.recipe.target_hook_point(name)
        names = self.recipe.hook_points(name) or (self.recipe.hook_point(name), *([] if target is None else [target]))
        stores = [ActivationStore.open(folder, hook_point) for hook_point in names]
        # The manifest of one elsewhere is here only now.
        self._check_cached()
        return stores[0] if len(stores) == 1 else JoinedStore(stores) if target is None else PairedStore(*stores)

    def views(self, name: str) -> tuple[StoreView, StoreView]:
        """Returns the training and the held-out documents' tokens for the SAE called `name`."""
        split = self.recipe.split
        return self.store(name).split(split.test_fraction, seed=split.seed)

    def sae(self, name: str) -> SAE:
        """Returns the trained SAE called `name`.

        Raises:
            ConfigError: it was trained with other values than the recipe has now.
        """
        self._check_trained(name)
        return load_sae(self.stage_folder("train", name))

    def _check_cached(self) -> None:
        """Checks that the cache, where there is one, was made with the recipe's values."""
        folder = self.stage_folder("cache")
        if (manifest := read_manifest(folder)) is not None:
            check_same_config(folder, manifest.config, self.recipe.cache.to_dict())

    def _check_trained(self, name: str) -> None:
        folder = self.stage_folder("train", name)
        if (manifest := read_manifest(folder)) is not None:
            run, split = self.recipe.train[name], self.recipe.split.to_dict()
            found = {key: manifest.config.get(key) for key in ("sae", "training", "split")}
            sae = run.sae.to_dict()
            # Widths that a recipe leaves out are 0 in it, and those of the store in what was trained.
            sae |= taken_from_store(sae, manifest)
            check_same_config(folder, found, {"sae": sae, "training": run.training.identity, "split": split})

    def run(self, *, together: bool = False) -> Path:
        """Runs every stage and returns the report's page; where all is done already, says so without loading a model.

        Args:
            together: see `train`.

        Raises:
            MissingDependencyError: an optimizer or a tracker of the recipe needs a package that is not installed; nothing is written.
        """
        if self._is_finished():
            self.progress.say(f"{self.recipe.name}: finished already, nothing to do")
            return self._index()
        self.recipe.check_packages()
        self.cache()
        self.train(together=together)
        self.label()
        if self.recipe.controls.random_weights:
            run_randomised(self, together=together)
        self.evaluate()
        index = self.report()
        write_json(self.folder / RUN_NAME, self._record())
        return index

    def cache(self) -> None:
        """Stores the model's activations.

        Raises:
            ConfigError: an SAE of the recipe asks for another width than its hook point has; nothing is written.
        """
        self._check_widths()
        with self._timed("cache", self.stage_folder("cache")):
            cache_activations(self.recipe.cache, self._cache_folder(), lm=self.lm, progress=self.progress)

    def train(self, only: str | None = None, *, together: bool = False) -> None:
        """Trains the recipe's SAEs, or the one called `only`.

        Args:
            together: whether those that read the same tokens in the same order share one read of the cache; the SAEs are the
                same, bit for bit. Those with the layout `layers` are spread over the processes in any case, and those on a ring
                share its one read.
        """
        names = self.names(only)
        if self.recipe.ring is not None:
            # A ring is read once for all; the processes that fill it have the model.
            together = True
            self.__dict__.pop("lm", None)
        runs = {name: self.recipe.train[name] for name in names}
        shared = [n for n, run in runs.items() if (together or run.training.layout == "layers") and not run.start_from]
        alone = [name for name in names if name not in shared]
        if shared:
            started = time.monotonic()
            train_together({self.stage_folder("train", n): self._trainer(n) for n in shared}, progress=self.progress)
            self.progress.say(f"train: {len(shared)} SAEs done in {time.monotonic() - started:,.1f} s")
        for name in alone:
            folder = self.stage_folder("train", name)
            with self._timed(f"train {name}", folder):
                self._trainer(name).fit(folder, progress=NamedProgress(self.progress, name))
        finish_ring(self.recipe)

    def _trainer(self, name: str) -> Trainer:
        config = self.recipe.train[name]
        train, test = self.views(name)
        train = on_ring(self.recipe, train)
        cfg = sized(config.sae, train.store)
        sae = build_sae(cfg, seed=config.training.seed, hook_point=train.store.hook_point)
        if config.start_from is not None:
            sae.load_state_dict(self.sae(config.start_from).state_dict())
        lm = self.lm if config.training.objective is not None else None
        return Trainer(sae, train, self.recipe.training(name), test=test, lm=lm)

    def label(self, only: str | None = None, *, retry_failed: bool = False) -> None:
        """Labels and scores the features of the trained SAEs; `retry_failed`: those too whose labels failed before."""
        for name in self.names(only):
            folder = self.stage_folder("label", name)
            train, test = self.views(name)
            with self._timed(f"label {name}", folder):
                label_features(
                    self.sae(name),
                    train,
                    test=test,
                    lm=self.lm,
                    out=folder,
                    config=self.recipe.label,
                    retry_failed=retry_failed,
                    progress=NamedProgress(self.progress, name),
                )

    def label_estimates(self, only: str | None = None) -> list[tuple[str, str]]:
        """Returns `(SAE, requests, tokens and cost of its labels by a language model)`; asks nothing and pays nothing.

        The evidence is gathered on the way and kept for the run itself.

        Raises:
            ConfigError: the recipe has no labelling model.
        """
        rows = []
        for name in self.names(only):
            train, test = self.views(name)
            estimate = estimate_labels(
                self.sae(name),
                train,
                test=test,
                lm=self.lm,
                out=self.stage_folder("label", name),
                config=self.recipe.label,
                progress=NamedProgress(self.progress, name),
            )
            rows.append((f"label {name}", str(estimate)))
        return rows

    def evaluate(self, only: str | None = None) -> None:
        """Measures the trained SAEs on the held-out documents; of several, writes which of them no other one beats."""
        for name in self.names(only):
            folder = self.stage_folder("evaluate", name)
            train, test = self.views(name)
            with self._timed(f"evaluate {name}", folder):
                evaluate(
                    self.sae(name),
                    test,
                    lm=self.lm,
                    config=self.recipe.evaluate,
                    out=folder,
                    train=train,
                    progress=NamedProgress(self.progress, name),
                )
        evaluated = [name for name in self.recipe.train if self._if_finished("evaluate", name)]
        write_fronts(self.recipe, {name: self._evaluations(name)[name] for name in evaluated})

    def report(self) -> Path:
        """Builds the feature browser from whatever stages are finished and returns its first page."""
        for name in self.recipe.train:
            self.store(name)
        runs = [
            ReportRun(
                name=name,
                sae=self.stage_folder("train", name),
                labels=self._if_finished("label", name),
                evaluation=self._if_finished("evaluate", name),
            )
            for name in self.recipe.train
            if self._if_finished("train", name)
        ]
        if not runs:
            raise ConfigError(f"{str(self.folder)!r}: no trained SAE to report on; run 'saekit train' first")
        with self._timed("report", self.stage_folder("report")):
            return build_report(
                self.stage_folder("report"),
                title=self.recipe.report.title or self.recipe.name,
                store=self.stage_folder("cache"),
                runs=runs,
                tokenizer=self.lm.tokenizer,
                progress=self.progress,
            )

    def plan(self, *, only: str | None = None) -> list[tuple[str, str]]:
        """Returns `(stage, what it would do)` without writing anything.

        Raises:
            ResourceError: the disk cannot hold the cache.
            MissingDependencyError: an optimizer or a tracker of the recipe needs a package that is not installed.
        """
        if only is None:
            self.recipe.check_packages()
        rows = []
        for stage, name in self._stages():
            if only not in {None, stage}:
                continue
            manifest = read_manifest(self.stage_folder(stage, name))
            if stage == "cache":
                self._check_cached()
            if stage == "train" and name is not None:
                self._check_trained(name)
            state = "new" if manifest is None else "finished" if manifest.status == "complete" else "resume"
            what = describe_stage(self, stage, name) if state != "finished" else ""
            rows.append((f"{stage} {name}" if name else stage, f"{state}  {what}".rstrip()))
            if stage == "cache" and self.recipe.ring is not None:
                rows.append(("ring", describe_ring(self)))
        if only is None and self.recipe.controls.random_weights:
            rows += randomised_plan(self)
        return rows

    def metric_tables(self, only: str | None = None) -> dict[str, EvaluationTable]:
        """Returns the evaluation of each SAE as a table."""
        return {name: evaluation.table() for name, evaluation in self._evaluations(only).items()}

    def summary(self) -> EvaluationTable:
        """Returns the first figures of every SAE and of its nulls."""
        return summary_table(self._evaluations(None))

    def _evaluations(self, only: str | None) -> dict[str, Evaluation]:
        return {name: read_evaluation(self.stage_folder("evaluate", name)) for name in self.names(only)}

    def _check_widths(self) -> None:
        for name, run in self.recipe.train.items():
            if run.sae.d_in:
                places = self.recipe.hook_points(name) or (self.recipe.hook_point(name),)
                check_width(self.lm, places, run.sae.d_in, where=f"train.{name}.sae.d_in")

    @contextlib.contextmanager
    def _timed(self, stage: str, folder: Path) -> Iterator[None]:
        """Says what the block took, or that its stage was finished before."""
        manifest = read_manifest(folder)
        was_finished = manifest is not None and manifest.status == "complete"
        started = time.monotonic()
        yield
        took = "was finished already" if was_finished else f"done in {time.monotonic() - started:,.1f} s"
        self.progress.say(f"{stage}: {took}: {folder}")

    def _stages(self) -> list[tuple[str, str | None]]:
        per_sae: list[tuple[str, str | None]] = [
            (s, n) for s in ("train", "label", "evaluate") for n in self.recipe.train
        ]
        return [("cache", None), *per_sae, ("report", None)]

    def names(self, only: str | None) -> list[str]:
        """Returns the SAEs of the recipe, or the one called `only`."""
        if only is not None and only not in self.recipe.train:
            raise ConfigError(f"--sae {only!r}: the recipe has {', '.join(self.recipe.train)}")
        return [only] if only is not None else list(self.recipe.train)

    def _if_finished(self, stage: str, name: str) -> Path | None:
        folder = self.stage_folder(stage, name)
        manifest = read_manifest(folder)
        return folder if manifest is not None and manifest.status == "complete" else None

    def _index(self) -> Path:
        return (self.stage_folder("report") / "index.html").resolve()

    def _record(self) -> dict[str, object]:
        folders = {
            f"{stage}/{name}" if name else stage: self.stage_folder(stage, name) for stage, name in self._stages()
        }
        return {
            "recipe": self.recipe.to_dict(),
            "stages": {key: manifest_sha256(folder) for key, folder in folders.items()},
        }

    def _is_finished(self) -> bool:
        try:
            recorded = json.loads((self.folder / RUN_NAME).read_text(encoding="utf-8"))
            return recorded == self._record() and self._index().is_file()
        except (OSError, ValueError, SaekitError):
            return False
