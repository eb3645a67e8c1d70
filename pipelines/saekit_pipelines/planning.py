"""The plan of a recipe on named hardware: parameters, memory, disk, hours of each stage, what binds, and the commands."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from saekit.activations.codec import token_bytes
from saekit.activations.config import CacheConfig
from saekit.activations.plan import CacheSize, cache_size, free_bytes
from saekit.errors import ConfigError, ModelError
from saekit.manifest import read_manifest
from saekit.models.outline import ModelOutline, outline_model
from saekit.sae import SAEConfig, SitesConfig, TranscoderConfig
from saekit.training.costs import LanguageModelCost, Limit, StoreSize
from saekit.training.hardware import Hardware
from saekit.training.planner import WORTH_IT, TrainingPlan, plan_training, together_seconds
from saekit_pipelines.recipe import Recipe
from saekit_pipelines.ring_plan import RingStage, plan_ring_stage

__all__ = ["CacheStage", "RecipePlan", "Together", "TrainStage", "plan_recipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStage:
    """The caching stage, planned; one process runs it."""

    size: CacheSize
    """What it will hold."""
    free_bytes: int
    """On the disk where it will be."""
    upload_to: str | None
    """URL where it will be instead."""
    model_bytes: int
    """The language model on the device."""
    tokens_per_second: float
    """At sustained rates."""
    limit: Limit
    """The forward, or the disk."""
    is_finished: bool
    """Whether it is there already."""

    @property
    def fits_disk(self) -> bool:
        """Whether the disk has room for it, if that is where it will be."""
        return self.is_finished or self.upload_to is not None or self.size.size_bytes <= self.free_bytes

    @property
    def hours(self) -> float:
        """Still to be spent."""
        return 0.0 if self.is_finished else self.size.num_tokens / self.tokens_per_second / 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStage:
    """One SAE of the recipe."""

    name: str
    """Its name."""
    plan: TrainingPlan
    """What it costs."""
    is_finished: bool
    """Whether it is trained already."""

    @property
    def hours(self) -> float:
        """Still to be spent."""
        return 0.0 if self.is_finished else self.plan.hours


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """SAEs that one read of the data can serve, in one process."""

    names: tuple[str, ...]
    """Which."""
    device_bytes: int
    """What the device holds of all of them."""
    hours: float
    """Of all of them."""
    hours_alone: float
    """One after another, each in its own layout."""
    fits: bool
    """Whether the device holds them."""

    @property
    def is_better(self) -> bool:
        """Whether it fits and is faster by more than the uncertainty of the figures."""
        return self.fits and self.hours * WORTH_IT <= self.hours_alone


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipePlan:
    """Everything of a recipe that can be predicted before it runs."""

    hardware: Hardware
    """What for."""
    num_nodes: int
    """How many nodes there are."""
    cache: CacheStage
    """The first stage."""
    train: tuple[TrainStage, ...]
    """The SAEs."""
    together: tuple[Together, ...]
    """SAEs that one read of the data can serve, by groups."""
    ring: RingStage | None
    """What is trained on, where it is not the cache."""
    commands: tuple[str, ...]
    """To be run in order."""

    @property
    def hours(self) -> float:
        """Caching and all trainings, as the commands run them."""
        if self.ring is not None:
            return self.cache.hours + self.ring.hours
        saved = sum(group.hours_alone - group.hours for group in self.together if group.is_better)
        return self.cache.hours + sum(stage.hours for stage in self.train) - saved

    @property
    def disk_bytes(self) -> int:
        """Of the cache, and the ring where there is one."""
        return self.cache.size.size_bytes if self.ring is None else self.ring.sizes.disk

    @property
    def is_possible(self) -> bool:
        """Whether disk and devices hold it."""
        return self.fits_disk and all(stage.is_finished or stage.plan.fits for stage in self.train)

    @property
    def fits_disk(self) -> bool:
        """Whether the disk holds it."""
        if self.ring is None:
            return self.cache.fits_disk
        return self.cache.is_finished or self.disk_bytes <= self.cache.free_bytes


def plan_recipe(
    recipe: Recipe,
    hardware: Hardware,
    *,
    num_nodes: int = 1,
    disk: Path | None = None,
    width: int | None = None,
    arguments: Sequence[str] = (),
) -> RecipePlan:
    """Returns the plan; loads no weights, reads no text and writes nothing.

    Args:
        recipe: with its sweeps spelled out.
        hardware: device and node.
        num_nodes: nodes that there are.
        disk: a folder on the disk where the cache will be; None = the recipe's own.
        width: of the activations at every hook point; None = as the model's config says.
        arguments: the recipe's path and overrides, as they stand in the commands.

    Raises:
        ConfigError: a recipe that cannot run.
        ModelError: the model's config cannot be had.
    """
    outline = _outline(recipe.cache, width)
    cache = _cache_stage(recipe, outline, hardware, disk)
    lm = LanguageModelCost(
        flops_per_token=outline.flops_after,
        dtype=recipe.cache.model.dtype,
        num_bytes=outline.num_bytes,
        vocab_size=outline.vocab_size,
        context_len=recipe.cache.tokens.context_len,
    )
    stages = []
    for name, run in recipe.train.items():
        cfg = _sized(recipe, name, outline.widths)
        points = _hook_points(recipe, name)
        stored = sum(token_bytes(recipe.cache.dtype, outline.widths[point]) for point in points)
        kept = int(cache.size.num_tokens * (1 - recipe.split.test_fraction))
        plan = plan_training(
            cfg,
            run.training,
            hardware,
            store=StoreSize(num_tokens=kept, token_bytes=stored),
            num_nodes=num_nodes,
            lm=None if run.training.objective is None else lm,
        )
        stages.append(TrainStage(name=name, plan=plan, is_finished=_is_finished(recipe.folder / "train" / name)))
    together = tuple(_together(group, hardware) for group in _groups(recipe, stages))
    if recipe.ring is not None:
        # A ring is read once for all SAEs, whatever they need.
        together = ()
    return RecipePlan(
        hardware=hardware,
        num_nodes=num_nodes,
        cache=cache,
        train=tuple(stages),
        together=together,
        ring=None
        if recipe.ring is None
        else plan_ring_stage(
            recipe,
            outline.widths,
            kept_bytes=cache.size.size_bytes,
            fill_tokens_per_second=cache.tokens_per_second,
            train_hours=sum(stage.hours for stage in stages),
        ),
        commands=tuple(_commands(stages, together, hardware, arguments, has_ring=recipe.ring is not None)),
    )


def _outline(config: CacheConfig, width: int | None) -> ModelOutline:
    try:
        outline = outline_model(config.model, () if width is not None else config.hook_points)
    except ModelError as error:
        raise type(error)(f"{error}; plan needs the model's config") from error
    if width is None:
        return outline
    return replace(outline, widths=dict.fromkeys(config.hook_points, width))


def _cache_stage(recipe: Recipe, outline: ModelOutline, hardware: Hardware, disk: Path | None) -> CacheStage:
    config = recipe.cache
    size = cache_size(config, outline.widths)
    flops = outline.flops_before + outline.attention_before * config.tokens.context_len
    compute = hardware.flops(config.model.dtype) / flops
    # Each forward reads the weights once.
    weights = config.batch_size * config.tokens.context_len * hardware.memory_rate / outline.num_bytes
    written = hardware.disk_gb_s * 1e9 * size.num_tokens / size.size_bytes
    rates: dict[Limit, float] = {"compute": compute, "memory": weights, "disk": written}
    limit = min(rates, key=lambda key: rates[key])
    return CacheStage(
        size=size,
        free_bytes=free_bytes(disk or recipe.folder),
        upload_to=None if recipe.storage is None else recipe.storage.url,
        model_bytes=outline.num_bytes,
        tokens_per_second=rates[limit],
        limit=limit,
        is_finished=_is_finished(recipe.folder / "cache"),
    )


def _is_finished(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.status == "complete"


def _hook_points(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Returns all hook points whose activations an SAE reads or predicts."""
    target = recipe.target_hook_point(name)
    return recipe.hook_points(name) or (recipe.hook_point(name), *([] if target is None else [target]))


def _sized(recipe: Recipe, name: str, widths: Mapping[str, int]) -> SAEConfig:
    cfg = recipe.train[name].sae
    found = [widths[point] for point in _hook_points(recipe, name)]
    if isinstance(cfg, SitesConfig):
        if len(set(found)) > 1:
            raise ConfigError(f"train.{name}.hook_points: widths {found}, needs hook points of one width")
        cfg = cfg.with_num_sites(len(found))
    if isinstance(cfg, TranscoderConfig):
        cfg = cfg.with_d_out(found[1])
    return cfg.with_d_in(found[0])


def _groups(recipe: Recipe, stages: Sequence[TrainStage]) -> list[list[TrainStage]]:
    """Returns the SAEs that `--together` would train on one read, see `saekit.training.train_together`."""
    groups: dict[object, list[TrainStage]] = {}
    for stage in stages:
        run = recipe.train[stage.name]
        if run.start_from is None and run.training.objective is None and not stage.is_finished:
            order = (_hook_points(recipe, stage.name), run.training.batch_size, run.training.seed)
            groups.setdefault(order, []).append(stage)
    return [group for group in groups.values() if len(group) > 1]


def _together(group: Sequence[TrainStage], hardware: Hardware) -> Together:
    plans = [stage.plan for stage in group]
    needed = sum(plan.memory_alone.device for plan in plans)
    return Together(
        names=tuple(stage.name for stage in group),
        device_bytes=needed,
        hours=together_seconds(plans) / 3600,
        hours_alone=sum(stage.hours for stage in group),
        fits=needed <= hardware.memory_gb * 1e9,
    )


def _commands(
    stages: Sequence[TrainStage],
    together: Sequence[Together],
    hardware: Hardware,
    arguments: Sequence[str],
    *,
    has_ring: bool,
) -> list[str]:
    """Returns what to run: caching by one process, the trainings as is best for each, then everything else.

    Trainings on a ring take its batches in step, so that all of them have the most processes that are best for one.
    """
    recipe = shlex.join(arguments)
    shared = {name for group in together if group.is_better for name in group.names}
    open_stages = [stage for stage in stages if not stage.is_finished]
    counts = {stage.name: 1 if stage.name in shared else stage.plan.step.num_processes for stage in open_stages}
    if has_ring:
        counts = dict.fromkeys(counts, max(counts.values(), default=1))
    layouts = {stage.name: _layout(stage) for stage in open_stages if stage.name not in shared}
    last = f"saekit run {recipe}" + (" --together" if shared else "")
    if set(counts.values()) <= {1}:
        return [last]
    if len(set(counts.values())) == 1:
        chosen = "".join(layouts.values())
        trains = [_launch(next(iter(counts.values())), hardware, f"train {recipe}{chosen}")]
    else:
        trains = [
            _launch(n, hardware, f"train {recipe} --sae {name}{layouts[name]}")
            for name, n in counts.items()
            if name not in shared
        ]
    return [f"saekit cache {recipe}", *trains, last]


def _layout(stage: TrainStage) -> str:
    """Returns the override of a recipe that lays features over processes, with a space before it; nothing where none is."""
    step = stage.plan.step
    rows = step.num_processes // step.latents
    value = "latents" if rows == 1 else f"{{ data = {rows}, latents = {step.latents} }}"
    return f" {shlex.quote(f'train.{stage.name}.training.layout={value}')}" if step.latents > 1 else ""


def _launch(num_processes: int, hardware: Hardware, command: str) -> str:
    if num_processes == 1:
        return f"saekit {command}"
    nodes = -(-num_processes // hardware.gpus_per_node)
    if nodes > 1:
        return f"sbatch --nodes {nodes} --gpus-per-node {hardware.gpus_per_node} scripts/launch_slurm.sh {command}"
    return (
        f"accelerate launch --multi_gpu --num_machines 1 --num_processes {num_processes} -m saekit_pipelines {command}"
    )
