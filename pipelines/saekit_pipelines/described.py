"""What each stage of a recipe would do, in a phrase, before it does it."""

from typing import TYPE_CHECKING

from saekit.activations import CachePlan, plan_cache
from saekit.manifest import read_manifest
from saekit_pipelines.ringing import most_tokens, recipe_ring, ring_sizes

if TYPE_CHECKING:
    from saekit_pipelines.recipe import Recipe
    from saekit_pipelines.stages import Pipeline

__all__ = ["describe_ring", "describe_stage"]


def describe_stage(pipeline: "Pipeline", stage: str, name: str | None) -> str:
    """Returns what a stage would do; nothing, where its name says it all.

    Raises:
        ResourceError: the disk cannot hold the cache.
    """
    recipe = pipeline.recipe
    if stage == "cache":
        return _cache_plan(pipeline).summary()
    if stage == "train" and name is not None:
        run = recipe.train[name]
        sites = len(recipe.hook_points(name))
        kind = f"{run.sae.kind} of {sites} hook points" if sites else run.sae.kind
        return (
            f"{kind}, d_sae {run.sae.d_sae:,}, {run.training.num_tokens:,} tokens in {run.training.num_steps:,} steps"
        )
    if stage == "label":
        most = recipe.label.max_features
        return f"{', '.join(recipe.label.labelers)}, {'all' if most is None else f'{most:,}'} features"
    return ""


def describe_ring(pipeline: "Pipeline") -> str:
    """Returns the segments and the disk of a recipe's ring, and the pace of filling it.

    Raises:
        ConfigError: its budget is too small; the least that works is named.
    """
    recipe: Recipe = pipeline.recipe
    manifest = read_manifest(pipeline.stage_folder("cache"))
    if manifest is not None and manifest.status == "complete":
        return recipe_ring(recipe).sizes.summary(most_tokens(recipe))
    plan = _cache_plan(pipeline)
    sizes = ring_sizes(recipe, plan.widths, plan.size_bytes)
    return f"{sizes.summary(most_tokens(recipe))}; filled at about {plan.tokens_per_second:,.0f} tokens/s"


def _cache_plan(pipeline: "Pipeline") -> CachePlan:
    url = None if pipeline.recipe.storage is None else pipeline.recipe.storage.url
    return plan_cache(pipeline.recipe.cache, pipeline.stage_folder("cache"), lm=pipeline.lm, upload_to=url)
