"""Which SAEs of a recipe no other one beats, once several are evaluated."""

from collections.abc import Mapping

from saekit.evaluation import Evaluation, figures_of, pareto_rows, write_pareto
from saekit_pipelines.recipe import Recipe

__all__ = ["write_fronts"]


def write_fronts(recipe: Recipe, evaluations: Mapping[str, Evaluation]) -> None:
    """Writes `pareto.json`, `.csv` and `.md` into the run's folder; nothing of fewer than two SAEs.

    Raises:
        ResourceError: the folder cannot be written.
    """
    if len(evaluations) > 1:
        found = [figures_of(name, _place(recipe, name), evaluation) for name, evaluation in evaluations.items()]
        write_pareto(recipe.folder, pareto_rows(found))


def _place(recipe: Recipe, name: str) -> str:
    """Returns what the SAE called `name` reconstructs: its hook points."""
    target = recipe.target_hook_point(name)
    several = ", ".join(recipe.hook_points(name)) or recipe.hook_point(name)
    return several if target is None else f"{several} -> {target}"
