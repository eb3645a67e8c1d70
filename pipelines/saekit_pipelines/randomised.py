"""The same recipe on a model with random weights: what labels score that can tell nothing of what the model has learnt.

The model, and with it cache, dictionary, labels and judgements, is another one; everything that chooses (documents, split, seeds,
explainer, judge, scorers, numbers of features) is the recipe's. A dictionary of the trained model run on the other's activations
would be a control of nothing, as its features were not made for them.

Every parameter is randomised, embeddings, norms and biases among them (`saekit.models.randomised`).

Source: Heap et al. 2025 (Sparse autoencoders can interpret randomly initialized transformers, arXiv 2501.17727).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from saekit.labelling import read_controls, read_scores
from saekit.labelling.scoring.summary import summarise_scores
from saekit.manifest import write_json
from saekit_pipelines.named import NamedProgress

if TYPE_CHECKING:
    from saekit_pipelines.recipe import Recipe
    from saekit_pipelines.stages import Pipeline

__all__ = ["RANDOMISED_NAME", "randomised_plan", "randomised_recipe", "run_randomised"]

RANDOMISED_NAME = "random_weights"
MAIN = ("pearson", "f1", "accuracy")


def randomised_recipe(recipe: "Recipe") -> "Recipe":
    """Returns the recipe of the control: other weights, a folder in the recipe's own, nothing else changed."""
    model = recipe.cache.model.model_copy(update={"random_weights": "all"})
    storage = recipe.storage
    if storage is not None:
        storage = storage.model_copy(update={"url": f"{storage.url.rstrip('/')}/{RANDOMISED_NAME}"})
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}, random weights",
            "out": str(recipe.folder / RANDOMISED_NAME),
            "cache": recipe.cache.model_copy(update={"model": model}),
            "storage": storage,
            "controls": recipe.controls.model_copy(update={"random_weights": False}),
        }
    )


def run_randomised(pipeline: "Pipeline", *, together: bool) -> None:
    """Caches, trains and labels the control, writes `random_weights.json`, and says each main figure of both in one line."""
    twin = _twin(pipeline)
    twin.cache()
    twin.train(together=together)
    twin.label()
    found = {name: _beside(pipeline, twin, name) for name in pipeline.names(None)}
    write_json(pipeline.folder / f"{RANDOMISED_NAME}.json", found)
    for name, rows in found.items():
        for row in rows:
            if line := _line(row):
                pipeline.progress.say(f"{name}: {line}")


def randomised_plan(pipeline: "Pipeline") -> list[tuple[str, str]]:
    """Returns what the control would do, stage by stage."""
    stages = ("cache", "train", "label")
    return [(f"random weights: {stage}", what) for s in stages for stage, what in _twin(pipeline).plan(only=s)]


def _twin(pipeline: "Pipeline") -> "Pipeline":
    return type(pipeline)(
        randomised_recipe(pipeline.recipe), progress=NamedProgress(pipeline.progress, "random weights")
    )


def _beside(pipeline: "Pipeline", twin: "Pipeline", name: str) -> list[dict[str, object]]:
    """Returns one row for each scorer, labeler and judge: the summaries `trained` and `random`, None where there is none."""
    both = [_summaries(one, name) for one in (pipeline, twin)]
    return [
        {"scorer": key[0], "labeler": key[1], "judge": key[2], "trained": both[0].get(key), "random": both[1].get(key)}
        for key in sorted(both[0].keys() | both[1].keys(), key=lambda key: (key[0], key[1], key[2] or ""))
    ]


def _summaries(pipeline: "Pipeline", name: str) -> dict[tuple[str, str, str | None], dict[str, object]]:
    folder = pipeline.stage_folder("label", name)
    entries = summarise_scores(read_scores(folder), read_controls(folder), has_rules=True)
    return {(str(e["scorer"]), str(e["labeler"]), None if e["judge"] is None else str(e["judge"])): e for e in entries}


def _line(row: Mapping[str, object]) -> str | None:
    sides = [row["trained"], row["random"]]
    main = next((m for m in MAIN if any(isinstance(side, dict) and m in side for side in sides)), None)
    if main is None:
        return None
    shown = [_figure(side, main) for side in sides]
    return f"{row['scorer']}, {row['labeler']}: {main} {shown[0]} trained, {shown[1]} with random weights"


def _figure(side: object, main: str) -> str:
    if not isinstance(side, dict) or main not in side:
        return "none"
    low, high = side[f"{main}_interval"]
    return f"{side[main]:.2f} [{low:.2f}, {high:.2f}] over {side['scored']:,} features"
