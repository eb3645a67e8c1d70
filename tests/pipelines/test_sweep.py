"""Sweeps: one table of a recipe is several SAEs, which share a read of the cache; mistakes are one line."""

import json
from pathlib import Path

import pytest
from saekit_pipelines.cli import app
from saekit_pipelines.recipe import load_recipe
from saekit_pipelines.stages import Pipeline
from typer.testing import CliRunner

from saekit.errors import ConfigError
from saekit.sae import load_sae_folder

SWEEP = """
[train.topk]
sweep = { k = [2, 4], "training.seed" = [0, 7] }
[train.topk.sae]
kind = "topk"
d_sae = 64
[train.topk.training]
num_tokens = 1024
batch_size = 256
"""
NAMES = ["topk-k2-seed0", "topk-k2-seed7", "topk-k4-seed0", "topk-k4-seed7"]


@pytest.fixture
def recipe_file(recipe_file: Path) -> Path:
    """The recipe with a sweep in place of its SAEs."""
    text = recipe_file.read_text(encoding="utf-8")
    start, end = text.index("[train.topk.sae]"), text.index("[label.token_change]")
    recipe_file.write_text(text[:start] + SWEEP + text[end:], encoding="utf-8")
    return recipe_file


def test_sweep_is_an_sae_for_each_combination(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.topk.training.lr=1e-3"])
    assert list(recipe.train) == NAMES
    assert [(run.sae.to_dict()["k"], run.training.seed) for run in recipe.train.values()] == [
        (2, 0),
        (2, 7),
        (4, 0),
        (4, 7),
    ]
    assert {run.training.lr for run in recipe.train.values()} == {1e-3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.topk.sweep={}", r"train.topk.sweep: found \{\}, needs a table of lists"),
        ("train.topk.sweep=[4]", r"train.topk.sweep: found \[4\], needs a table of lists"),
        ("train.topk.sweep={k=4}", "train.topk.sweep.k: found 4, needs a list of values"),
        ("train.topk.sweep={k=[]}", r"train.topk.sweep.k: found \[\], needs a list of values"),
        ("train.topk.sweep={kk=[4]}", "train.topk.sweep: found key 'kk', needs a field of sae or training"),
        ("train.topk.sweep={k=[4, 4]}", "gives a second SAE called 'topk-k4', needs different values"),
        ("train.topk.sweep={d_sae=[4]}", "train.topk.sweep.d_sae: sae.d_sae is set as well, needs one of both"),
        ("train.topk.sweep={k=[4, 65]}", "train.topk-k65.*k is 65"),
    ],
)
def test_mistakes_are_one_line(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file, [override])
    assert "\n" not in str(caught.value)


def test_swept_saes_are_trained_together_from_the_command_line(recipe_file: Path) -> None:
    pipeline = Pipeline.load(recipe_file)
    pipeline.cache()
    done = CliRunner().invoke(app, ["train", str(recipe_file), "--together"])
    assert done.exit_code == 0, done.output
    # Two seeds are two orders of the data, each read once for two SAEs.
    assert done.output.count("2 SAEs on one read of the data") == 2
    for name in NAMES:
        assert load_sae_folder(pipeline.stage_folder("train", name)).cfg.to_dict()["k"] == int(name[6])
    pipeline.evaluate()
    rows = json.loads((pipeline.folder / "pareto.json").read_text())
    assert sorted(row["name"] for row in rows) == NAMES
    assert {row["place"] for row in rows} == {"model.layers.1"}
    assert any(row["fvu_front"] for row in rows)
