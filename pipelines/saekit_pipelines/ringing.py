"""The ring of a recipe: where it is, and what it will need before it is there."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from saekit.activations import HeldOut, Ring, RingView, StoreView, plan_ring
from saekit.activations.fillers import clear_ring
from saekit.activations.ring import RING_NAME, RingSizes, fit_segments
from saekit.manifest import read_manifest

if TYPE_CHECKING:
    from saekit_pipelines.recipe import Recipe

__all__ = ["finish_ring", "most_tokens", "on_ring", "places_of", "recipe_ring", "ring_sizes"]


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


def ring_sizes(recipe: "Recipe", widths: Mapping[str, int], kept_bytes: int) -> RingSizes:
    """Returns what the segments of a recipe that has a ring will be, before there is a cache.

    Args:
        recipe: that has a ring.
        widths: hook point -> width of its activations.
        kept_bytes: that the cache will take.

    Raises:
        ConfigError: the budget is too small; the least that works is named.
    """
    assert recipe.ring is not None
    return fit_segments(recipe.ring, recipe.cache, widths, kept_bytes=kept_bytes, batch_size=_batch_size(recipe))


def on_ring(recipe: "Recipe", train: StoreView) -> StoreView:
    """Returns what an SAE is trained on: the tokens of the ring, where the recipe has one, else those of the cache, `train`.

    Raises:
        ConfigError: the ring's budget is too small; the least that works is named.
    """
    return train if recipe.ring is None else RingView(train, recipe_ring(recipe))


def finish_ring(recipe: "Recipe") -> None:
    """Removes the segments of a ring, where there is one, once all SAEs of the recipe are trained."""
    folders = [recipe.folder / "train" / name for name in recipe.train]
    manifests = [read_manifest(folder) for folder in folders]
    is_done = all(manifest is not None and manifest.status == "complete" for manifest in manifests)
    if recipe.ring is not None and is_done and os.environ.get("RANK", "0") == "0":
        clear_ring(recipe_ring(recipe))


def _batch_size(recipe: "Recipe") -> int:
    return next(iter(recipe.train.values())).training.batch_size
