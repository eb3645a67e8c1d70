"""A recipe whose second SAE goes on from the first one on the model's own loss, and its mistakes in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from saekit_pipelines.recipe import load_recipe
from saekit_pipelines.stages import Pipeline

from saekit.errors import ConfigError
from saekit.sae import load_sae_folder
from saekit.training import read_metrics

TABLES = """
[train.topk.sae]
kind = "topk"
d_sae = 64
k = 4
[train.topk.training]
num_tokens = 8192
batch_size = 256
[train.kl]
start_from = "topk"
[train.kl.sae]
kind = "topk"
d_sae = 64
k = 4
[train.kl.training]
num_tokens = 1280
batch_size = 64
lr = 1e-4
init = "given"
objective = { kind = "kl_finetune" }
"""


@pytest.fixture
def recipe_file(recipe_file: Path, with_saes: Callable[[Path, str], Path]) -> Path:
    """The recipe with a fine-tuned SAE in place of the second one."""
    return with_saes(recipe_file, TABLES)


def test_second_sae_goes_on_from_the_first(recipe_file: Path) -> None:
    pipeline = Pipeline.load(recipe_file)
    pipeline.cache()
    # The second one waits for the first one whether or not others are trained together.
    pipeline.train(together=True)
    first, second = (load_sae_folder(pipeline.stage_folder("train", name)) for name in ("topk", "kl"))
    assert second.hook_point == first.hook_point
    moved = (second.W_dec - first.W_dec).detach().norm(dim=1)
    assert 0 < float(moved.mean()) < 0.2
    rows = [row for row in read_metrics(pipeline.stage_folder("train", "kl")) if row["split"] == "train"]
    assert all(float(str(row["kl"])) > 0 for row in rows)
    assert Pipeline.load(recipe_file).sae("kl").cfg == second.cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.kl.training.init=tied", "train.kl.training.init: found 'tied', needs 'given' for start_from"),
        ("train.topk.training.init=given", "train.topk.training.init: found 'given', needs start_from"),
        ("train.kl.start_from=other", "train.kl.start_from: found 'other', needs an SAE before it: topk"),
        ("train.kl.start_from=kl", "train.kl.start_from: found 'kl', needs an SAE before it: topk"),
        ("train.kl.sae.k=3", "train.kl.start_from: 'topk' has another sae table or hook point, needs the same ones"),
        ("train.kl.training.objective.kind=e3e", "train.kl.training.objective.kind: found 'e3e'"),
        ("train.kl.training.objective.weight=1", "unknown key 'train.kl.training.objective.weight'"),
        (
            "train.kl.training.objective.downstream_weight=2.0",
            "downstream_weight with kind 'kl_finetune', needs 'e2e_down",
        ),
        (
            "train.kl.training.batch_size=100",
            r"train.kl.training.batch_size: found 100, needs a multiple of 32: whole rows",
        ),
        (
            "train.kl.training.micro_batch_size=31",
            r"train.kl.training.micro_batch_size: found 31, needs .* row of 32 tokens",
        ),
    ],
)
def test_mistakes_are_one_line(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file, [override])
    assert "\n" not in str(caught.value)
