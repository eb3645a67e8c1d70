"""A recipe: one TOML file that says everything a run needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from saekit.activations import CacheConfig, RingConfig
from saekit.activations.location import RemoteConfig
from saekit.config import Config, apply_overrides, read_toml
from saekit.errors import ConfigError
from saekit.evaluation import EvaluationConfig
from saekit.labelling import LabelConfig, ReviveConfig
from saekit.sae import AnySAEConfig, SitesConfig, TranscoderConfig
from saekit.training import TrainConfig, check_low_bit, check_options, check_ring, check_trackers
from saekit_pipelines.sweep import expand_sweeps

__all__ = ["Recipe", "ReportConfig", "SplitConfig", "TrainRun", "load_recipe"]


SAEName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class SplitConfig(Config):
    """Which documents are held out of training, for evaluation and for scoring labels."""

    test_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    """Fraction of the tokens that is held out, by whole documents."""
    seed: int = Field(default=0, ge=0)
    """Chooses the documents."""


class TrainRun(Config):
    """One SAE of the recipe: `[train.<name>]`."""

    hook_point: str | None = None
    """Which cached hook point to train on; may be left out where the cache has only one."""
    hook_points: tuple[str, ...] | None = None
    """For a crosscoder or a multi-layer SAE: which cached hook points it is trained on, in order; may be left out where it is all."""
    target_hook_point: str | None = None
    """For a transcoder: which cached hook point's activations are predicted from those of `hook_point`."""
    start_from: str | None = None
    """Name of an SAE of the recipe that stands before this one, whose weights this one goes on from; with `init = "given"`."""
    sae: AnySAEConfig
    """The architecture: `kind`, `d_sae`, `k`, ...; `d_in` is the hook point's width and may be left out."""
    training: TrainConfig
    """Tokens, batch, learning rate, ..."""


class ReportConfig(Config):
    """The static site."""

    title: str | None = None
    """Heading of the site; None = the recipe's name."""


class ControlsConfig(Config):
    """Runs that know nothing, beside the recipe's own."""

    random_weights: bool = False
    """Whether `saekit run` also caches, trains and labels the same recipe on the model with random weights, in the folder
    `random_weights` of the run, and puts the scores of both side by side in `random_weights.json`. Labels that score no better than
    there tell nothing of what the model has learnt. Takes as long as the recipe, and each of both has the labels' caps for itself."""


class Recipe(Config):
    """The whole run: text -> activations -> SAEs -> labels -> evaluation -> report."""

    name: str = Field(min_length=1)
    """Short name, shown in the report."""
    out: str = Field(min_length=1)
    """Folder of the run; each stage writes a folder of its own inside."""
    cache: CacheConfig
    """Model, text, tokens and hook points."""
    storage: RemoteConfig | None = None
    """Where the activations lie; None = in the run's folder. No part of the cache's identity: they may be moved."""
    ring: RingConfig | None = None
    """Training on more tokens than the disk holds: their activations are made and deleted on the way, and the cache holds what
    stays (docs/scale.md); None = on the cache."""
    train: dict[SAEName, TrainRun] = Field(min_length=1)
    """The SAEs, by name: letters, digits, `_`, `-` and `.`, as a folder is called after it."""
    split: SplitConfig = SplitConfig()
    """Held-out documents."""
    label: LabelConfig = LabelConfig()
    """Who describes the features, from what, and how the labels are scored."""
    revive: ReviveConfig = ReviveConfig()
    """Which silent features `saekit revive` tries, and on what."""
    evaluate: EvaluationConfig = EvaluationConfig()
    """Metrics, null rows, intervals."""
    report: ReportConfig = ReportConfig()
    """The feature browser."""
    controls: ControlsConfig = ControlsConfig()
    """What the labels' scores are held against beside what each scorer has."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out).expanduser()

    def hook_point(self, name: str) -> str:
        """Returns the hook point of the SAE called `name`; the first of several.

        Raises:
            ConfigError: the run names none and the cache has several, or it names one that is not cached.
        """
        if several := self.hook_points(name):
            return several[0]
        asked, cached = self.train[name].hook_point, self.cache.hook_points
        if asked is None and len(cached) > 1:
            raise ConfigError(f"train.{name}: no hook_point, needs one of {', '.join(cached)}")
        if asked is not None and asked not in cached:
            raise ConfigError(f"train.{name}.hook_point: found {asked!r}, the cache has {', '.join(cached)}")
        return asked or cached[0]

    def hook_points(self, name: str) -> tuple[str, ...]:
        """Returns the hook points of the crosscoder or multi-layer SAE called `name`; none for others.

        Raises:
            ConfigError: it names one that is not cached, one twice, or a single one; or it is an SAE of one hook point.
        """
        run, cached = self.train[name], self.cache.hook_points
        where = f"train.{name}.hook_points"
        if not isinstance(run.sae, SitesConfig):
            if run.hook_points is not None:
                raise ConfigError(f"{where}: found {', '.join(run.hook_points)}, {run.sae.kind!r} takes one hook_point")
            return ()
        if run.hook_point is not None:
            raise ConfigError(f"train.{name}.hook_point: found {run.hook_point!r}, {run.sae.kind!r} takes hook_points")
        asked = cached if run.hook_points is None else run.hook_points
        foreign = [hook_point for hook_point in asked if hook_point not in cached]
        if foreign:
            raise ConfigError(f"{where}: found {foreign[0]!r}, the cache has {', '.join(cached)}")
        if len(asked) < 2 or len(set(asked)) < len(asked):
            raise ConfigError(f"{where}: found {', '.join(asked)}, {run.sae.kind!r} needs at least two different ones")
        if run.sae.num_sites not in {0, len(asked)}:
            raise ConfigError(
                f"train.{name}.sae.num_sites: found {run.sae.num_sites}, hook_points are {len(asked)}; leave it out to take it"
            )
        return asked

    def target_hook_point(self, name: str) -> str | None:
        """Returns the hook point that the SAE called `name` predicts; None but for transcoders.

        Raises:
            ConfigError: a transcoder names none that is cached, or an SAE that is no transcoder names one.
        """
        run, cached = self.train[name], self.cache.hook_points
        if isinstance(run.sae, TranscoderConfig) != (run.target_hook_point is not None):
            needs = "a transcoder needs one" if run.target_hook_point is None else "only a transcoder takes one"
            raise ConfigError(f"train.{name}.target_hook_point: found {run.target_hook_point!r}, {needs}")
        if run.target_hook_point is not None and run.target_hook_point not in cached:
            raise ConfigError(
                f"train.{name}.target_hook_point: found {run.target_hook_point!r}, the cache has {', '.join(cached)}"
            )
        return run.target_hook_point

    def training(self, name: str) -> TrainConfig:
        """Returns how the SAE called `name` is trained; its trackers' run begins with the recipe's name where it has no other."""
        training = self.train[name].training
        return training.model_copy(update={"tracker_run": training.tracker_run or self.name})

    def check_start(self, name: str) -> None:
        """Checks where the SAE called `name` takes its first weights from.

        Raises:
            ConfigError: from an SAE that does not come before it, has another shape or hook point, or without `init = "given"`.
        """
        run = self.train[name]
        where, init = f"train.{name}.start_from", run.training.init
        if (run.start_from is None) != (init == "tied"):
            needs = (
                "needs 'given' for start_from"
                if run.start_from is not None
                else "needs start_from, the SAE to go on from"
            )
            raise ConfigError(f"train.{name}.training.init: found {init!r}, {needs}")
        if run.start_from is None:
            return
        before = list(self.train)[: list(self.train).index(name)]
        if run.start_from not in before:
            raise ConfigError(
                f"{where}: found {run.start_from!r}, needs an SAE before it: {', '.join(before) or 'none is'}"
            )
        start = self.train[run.start_from]
        if start.sae != run.sae or self._places(run.start_from) != self._places(name):
            raise ConfigError(f"{where}: {run.start_from!r} has another sae table or hook point, needs the same ones")

    def check_training(self, name: str) -> None:
        """Checks the training options of the SAE called `name` against its kind and the cache.

        Raises:
            ConfigError: one means nothing to this kind of SAE, or a batch does not fit the tokens or token rows that are cached.
        """
        run, where = self.train[name], f"train.{name}.training"
        check_options(run.sae, run.training, where=where)
        kept = int(self.cache.num_tokens * (1 - self.split.test_fraction))
        if run.training.batch_size > kept:
            raise ConfigError(
                f"{where}.batch_size: found {run.training.batch_size:,}, needs at most the {kept:,} tokens"
                " that the cache keeps for training; cache more tokens or lower it"
            )
        if run.training.objective is None:
            return
        context_len = self.cache.tokens.context_len
        if run.training.batch_size % context_len:
            raise ConfigError(
                f"{where}.batch_size: found {run.training.batch_size:,}, needs a multiple of {context_len:,}: whole rows"
            )
        if run.training.micro_batch_size is not None and run.training.micro_batch_size < context_len:
            raise ConfigError(
                f"{where}.micro_batch_size: found {run.training.micro_batch_size:,}, needs at least one row of"
                f" {context_len:,} tokens"
            )

    def check_ring(self) -> None:
        """Checks that one read of a ring can serve all SAEs, where there is a ring.

        Raises:
            ConfigError: one of them cannot be trained on a ring, or needs other batches.
        """
        if self.ring is None:
            return
        if self.storage is not None:
            raise ConfigError(
                f"ring: found storage.url {self.storage.url!r} beside it, but a ring's activations stay on this disk; needs one of"
                " the two"
            )
        check_ring({f"train.{name}.training": run.training for name, run in self.train.items()})
        for name, run in self.train.items():
            if run.start_from is not None:
                raise ConfigError(
                    f"train.{name}.start_from: found {run.start_from!r} on a ring, which is read once for all SAEs; needs none,"
                    " or a recipe without ring"
                )

    def check_packages(self) -> None:
        """Checks that what the optimizers and the trackers need is installed.

        Raises:
            MissingDependencyError: it is not.
            ConfigError: there is no such tracker.
        """
        check_trackers(name for run in self.train.values() for name in run.training.trackers)
        if any(run.training.optimizer == "adamw8bit" for run in self.train.values()):
            check_low_bit()

    def _places(self, name: str) -> tuple[object, ...]:
        return self.hook_point(name), self.hook_points(name), self.target_hook_point(name)


_SWEPT_FIELDS = {
    "sae": frozenset(name for cfg in get_args(get_args(AnySAEConfig)[0]) for name in cfg.model_fields),
    "training": frozenset(TrainConfig.model_fields),
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Returns the recipe at `path` with `key=value` overrides applied and sweeps spelled out.

    Raises:
        ConfigError: one line that names the key, what was found and what is needed.
    """
    values = expand_sweeps(apply_overrides(read_toml(path), overrides), fields=_SWEPT_FIELDS)
    recipe = Recipe.parse(values, where=f"recipe {str(path)!r}")
    for name in recipe.train:
        recipe.hook_point(name)
        recipe.target_hook_point(name)
        recipe.check_start(name)
        recipe.check_training(name)
    recipe.check_ring()
    return recipe
