"""The ring of a recipe: where it is, and what it will need before it is there."""

from typing import TYPE_CHECKING

from saekit.activations import HeldOut, Ring, plan_ring
from saekit.activations.fillers import clear_ring
from saekit.activations.plan import CachePlan
from saekit.activations.ring import RING_NAME, RingSizes, fit_segments
from saekit.manifest import read_manifest

if TYPE_CHECKING:
    from saekit_pipelines.recipe import Recipe

__all__ = ["most_tokens", "places_of", "recipe_ring", "remove_ring_segments", "ring_sizes"]


def places_of(recipe: "Recipe") -> tuple[tuple[str, ...], ...]:
    """Returns the hook points of each SAE, sorted, each set once."""
    found = set()
    for name in recipe.train:
        target = recipe.target_hook_point(name)
        several = recipe.hook_points(name) or (recipe.hook_point(name), *([] if target is None else [target]))
        found.add(tuple(sorted(set(several))))
    return tuple(sorted(found))


def most_tokens(recipe: "Recipe") -> int:
    """Returns the tokens of the longest training."""
    return max(run.training.num_steps * run.training.batch_size for run in recipe.train.values())


def recipe_ring(recipe: "Recipe") -> Ring:
    """Returns the ring of a recipe that has one, beside its finished cache.

    Raises:
        ConfigError: the budget is too small; the least that works is named.
        StoreError: there is no finished cache.
    """
    assert recipe.ring is not None
    return plan_ring(
        recipe.ring,
        recipe.folder / "cache",
        recipe.folder / RING_NAME,
        split=HeldOut(
            test_fraction=recipe.split.test_fraction,
            seed=recipe.split.seed,
            places=places_of(recipe),
        ),
        batch_size=_batch_size(recipe),
    )


def ring_sizes(recipe: "Recipe", cache: CachePlan) -> RingSizes:
    """Returns what the segments of a recipe that has a ring will be, before there is a cache.

    Raises:
        ConfigError: the budget is too small; the least that works is named.
    """
    assert recipe.ring is not None
    return fit_segments(
        recipe.ring, recipe.cache, cache.widths, kept_bytes=cache.size_bytes, batch_size=_batch_size(recipe)
    )


def remove_ring_segments(recipe: "Recipe") -> None:
    """Removes the segments of a ring that all SAEs of the recipe are done with."""
    folders = [recipe.folder / "train" / name for name in recipe.train]
    manifests = [read_manifest(folder) for folder in folders]
    if all(manifest is not None and manifest.status == "complete" for manifest in manifests):
        clear_ring(recipe_ring(recipe))


def _batch_size(recipe: "Recipe") -> int:
    return next(iter(recipe.train.values())).training.batch_size
