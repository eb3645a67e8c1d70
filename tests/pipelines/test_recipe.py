"""Recipes: the golden ones are complete; mistakes are one line."""

from pathlib import Path

import pytest
from saekit_pipelines.recipe import load_recipe
from saekit_pipelines.stages import Pipeline

from saekit.errors import ConfigError, MissingDependencyError

RECIPES = sorted((Path(__file__).parents[2] / "pipelines" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_golden_recipe_is_complete(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.folder.as_posix().startswith("runs/")
    for name, run in recipe.train.items():
        assert recipe.hook_point(name) in recipe.cache.hook_points
        assert run.training.num_steps > 100


def test_golden_recipes_are_these() -> None:
    assert [path.stem for path in RECIPES] == [
        "gemma2_2b_resid12_jumprelu",
        "gpt2_mlp8_transcoder",
        "gpt2_resid8_e2e",
        "gpt2_resid8_sweep",
        "gpt2_resid8_topk",
        "gpt2_resid_crosscoder",
        "llama3_8b_resid15_batchtopk",
        "quickstart",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.num_token=5", r"unknown key 'cache.num_token'; did you mean 'num_tokens'\?"),
        ("train.topk.sae.kk=5", "unknown key 'train.topk.sae.kk'"),
        ("train.topk.sae.kind=topp", "unknown kind 'topp', needs one of"),
        ("cache.text.kind=file", "unknown kind 'file', needs one of"),
        ("cache.num_tokens=many", "cache.num_tokens: found 'many'"),
        ("train.topk.sae.d_sae=0", "d_sae"),
        ("train.topk.sae.k=0", "k"),
        ("train.topk.sae.k=65", "k is 65"),
        ("train.jumprelu.sae.target_l0=-1", "target_l0 is -1"),
        (
            "train.topk.hook_point=model.layers.2",
            "train.topk.hook_point: found 'model.layers.2', the cache has model.layers.1",
        ),
        (
            'cache.hook_points=["model.layers.0","model.layers.1"]',
            "train.topk: no hook_point, needs one of model.layers.0, model.layers.1",
        ),
        ("cache.hook_points=[]", "cache.hook_points"),
        ("split.test_fraction=1.5", "split.test_fraction: found 1.5"),
        ("out=", "out: found ''"),
        ("name=", "name: found ''"),
        ("train.topk.sae.k=true", "train.topk.sae.k: found True, input should be a valid integer"),
        ('train.topk.sae.d_sae="64"', "train.topk.sae.d_sae: found '64', input should be a valid integer"),
        ("train.topk.training.lr=inf", "train.topk.training.lr"),
        ("train.topk.training.seed=-1", "train.topk.training.seed: found -1"),
        ("cache.text.shuffle_seed=-1", "cache.text.shuffle_seed: found -1"),
        ("train.topk.training.betas=[2, 3]", "train.topk.training.betas"),
        ("train.topk.training={num_tokens=512, betas=[0.8, 0.9], optimizer='signum'}", "betas with optimizer 'signum'"),
        (
            "train.topk.training.sparsity.dead_loss=pre_act",
            "train.topk.training: sparsity.dead_loss 'pre_act' with 'topk'",
        ),
        (
            "train.jumprelu.training.sparsity.k_start_factor=2",
            "train.jumprelu.training: sparsity.k_start_factor 2 with 'jump",
        ),
        ("train.topk.hook_points=['model.layers.1']", "train.topk.hook_points: found model.layers.1, 'topk' takes one"),
        ("train.topk.training.batch_size=999_999", "train.topk.training.batch_size: found 999,999, needs at most"),
        ("cache.num_tokens=2024-01-01", "cache.num_tokens: found '2024-01-01'"),
        ('label={llm={model="m"}, labelers=["lexical"]}', "add 'llm' to them"),
        ("labl.max_features=3", r"unknown key 'labl'; did you mean 'label'\?"),
    ],
)
def test_load_recipe_refuses_in_one_line(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file, [override])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("recipe ", "train."))


def test_missing_package_of_an_optimizer_stops_a_run_before_anything_is_written(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    pipeline = Pipeline.load(recipe_file, ["train.topk.training.optimizer=adamw8bit"])
    for go in (pipeline.run, pipeline.plan):
        with pytest.raises(MissingDependencyError, match="optimizer 'adamw8bit', needs the package bitsandbytes"):
            go()
    assert not pipeline.folder.exists()


def test_one_hook_point_need_not_be_named(recipe_file: Path) -> None:
    assert load_recipe(recipe_file).hook_point("topk") == "model.layers.1"


@pytest.mark.parametrize("name", ["../evil", "", ".", "a/b", "-x"])
def test_names_of_saes_are_names_of_folders(recipe_file: Path, name: str) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("[train.topk.", f'[train."{name}".'))
    with pytest.raises(ConfigError, match="train"):
        load_recipe(recipe_file)


def test_a_table_for_a_labelling_model_asks_for_its_labels(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ['label.llm={model="m"}']).label.labelers == ("lexical", "llm")
    assert load_recipe(recipe_file).label.labelers == ("lexical",)
