"""Recipes with crosscoders and multi-layer SAEs: from the model to a report, and the mistakes in one line."""

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saekit_pipelines.recipe import load_recipe
from saekit_pipelines.stages import Pipeline

from saekit.activations import ActivationStore, StoreView
from saekit.errors import ConfigError
from saekit.evaluation import EvaluationConfig, evaluate, read_evaluation
from saekit.labelling.contexts import FeatureContexts
from saekit.manifest import read_manifest
from saekit.sae import MLSAE, BatchTopKCrosscoder, load_sae_folder

NAMES = ("model.layers.0", "model.layers.1", "model.layers.2")
HOOK_POINTS = f"cache.hook_points={json.dumps([*NAMES, 'model.layers.1.mlp.gate_proj'])}"
TRAINING = """
num_tokens = 8192
batch_size = 128
lr = 3e-3
"""
TABLES = f"""
[train.cross]
hook_points = ["model.layers.0", "model.layers.1", "model.layers.2"]
[train.cross.sae]
kind = "crosscoder_batchtopk"
d_sae = 64
k = 4
[train.cross.training]
{TRAINING}
[train.all]
hook_points = ["model.layers.0", "model.layers.2"]
[train.all.sae]
kind = "mlsae"
d_sae = 64
k = 4
[train.all.training]
{TRAINING}
"""


@pytest.fixture
def recipe_file(recipe_file: Path, with_saes: Callable[[Path, str], Path]) -> Path:
    """The recipe with dictionaries of several hook points in place of its SAEs."""
    return with_saes(recipe_file, TABLES)


def fvu(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """Of each hook point, of x [N, S, D]."""
    error, centred = (x - x_hat).double(), (x - x.mean(0)).double()
    return error.square().sum((0, 2)) / centred.square().sum((0, 2))


def test_recipe_of_several_hook_points_runs_to_its_report(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(recipe_file, [HOOK_POINTS, "evaluate.num_tokens=100000"])
    said: list[str] = []
    monkeypatch.setattr(type(pipeline.progress), "say", lambda self, message: said.append(message))
    plan = dict(pipeline.plan())
    assert plan["train cross"].startswith("new  crosscoder_batchtopk of 3 hook points, d_sae 64")
    index = pipeline.run()
    assert index.is_file()

    cross = load_sae_folder(pipeline.stage_folder("train", "cross"))
    assert isinstance(cross, BatchTopKCrosscoder)
    assert (cross.hook_points, cross.d_in) == (NAMES, 32)
    _, test = pipeline.views("cross")
    x = test.read(test.indices)
    expected = fvu(x.reshape(-1, 3, 32), cross(x).x_hat.detach().reshape(-1, 3, 32))
    evaluation = read_evaluation(pipeline.stage_folder("evaluate", "cross"))
    found = [evaluation.value(f"fvu@{name}") for name in NAMES]
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert evaluation.fvu == pytest.approx(float(expected.mean()), rel=1e-4)
    assert float(expected.max()) < 0.8
    assert evaluation.value("ce") is None
    assert any("CE and KL are left out: a crosscoder reads hook points behind" in message for message in said)
    assert any("null rows left out, without meaning for a BatchTopKCrosscoder: random" in message for message in said)
    assert evaluation.value("fvu@model.layers.1", row="mean") == pytest.approx(1.0)
    assert [row.name for row in evaluation.rows] == ["sae", "mean", "pca"]
    lines = [line[0] for line in evaluation.table().rows]
    assert lines[:4] == ["FVU", *(f"FVU at {name}" for name in NAMES)]

    whole = load_sae_folder(pipeline.stage_folder("train", "all"))
    assert isinstance(whole, MLSAE)
    names = (NAMES[0], NAMES[2])
    assert whole.hook_points == names
    _, test = pipeline.views("all")
    x = test.read(test.indices)
    expected = fvu(x.reshape(-1, 2, 32), whole(x).x_hat.detach().reshape(-1, 2, 32))
    evaluation = read_evaluation(pipeline.stage_folder("evaluate", "all"))
    assert [evaluation.value(f"fvu@{name}") for name in names] == pytest.approx(expected.tolist(), rel=1e-3)
    # At each hook point it is measured as the SAE that it is there.
    one = [
        evaluate(
            whole.at(name),
            StoreView(ActivationStore.open(pipeline.stage_folder("cache"), name), test.mask),
            lm=pipeline.lm,
            config=EvaluationConfig(num_tokens=100_000, num_loss_tokens=256, nulls=(), num_bootstrap=0),
        )
        for name in names
    ]
    assert all(each.value("ce") is not None for each in one)
    for metric in ("l0", "delta_ce"):
        alone = [each.value(metric) for each in one]
        assert [evaluation.value(f"{metric}@{name}") for name in names] == pytest.approx(alone, rel=1e-4)
        assert evaluation.value(metric) == pytest.approx(sum(map(float, map(str, alone))) / 2, rel=1e-4)
    assert [row.name for row in evaluation.rows] == ["sae", "mean", "pca", "random"]
    active = whole.encode(x) > 0
    assert evaluation.features is not None
    torch.testing.assert_close(
        torch.from_numpy(evaluation.features.density), active.float().mean((0, 1)), rtol=1e-4, atol=1e-4
    )

    train, _ = pipeline.views("all")
    contexts = FeatureContexts.open(pipeline.stage_folder("label", "all") / "contexts")
    acts = whole.encode(train.read(train.indices)).amax(1)
    torch.testing.assert_close(torch.from_numpy(contexts.firing_count), (acts > 0).sum(0))
    torch.testing.assert_close(torch.from_numpy(contexts.max_act), acts.amax(0).detach(), rtol=1e-4, atol=1e-4)
    for name in ("cross", "all"):
        manifest = read_manifest(pipeline.stage_folder("label", name))
        assert manifest is not None
        assert manifest.status == "complete"
        assert (pipeline.stage_folder("label", name) / "effects-tokenchange.safetensors").is_file()
    report = (pipeline.stage_folder("report") / "data" / "report.js").read_text(encoding="utf-8")
    assert b"FVU at model.layers.2" in zlib.decompress(base64.b64decode(report.split('"')[3]))
    again = Pipeline.load(recipe_file, [HOOK_POINTS, "evaluate.num_tokens=100000"])
    assert again.run() == index
    assert next(row[0] for row in again.summary().rows) == "cross"


def test_all_cached_hook_points_are_taken_where_none_is_named(recipe_file: Path) -> None:
    text = recipe_file.read_text(encoding="utf-8")
    text = text.replace('hook_points = ["model.layers.0", "model.layers.1", "model.layers.2"]\n', "")
    recipe_file.write_text(text, encoding="utf-8")
    recipe = load_recipe(recipe_file, [f"cache.hook_points={json.dumps(NAMES[::-1])}"])
    assert recipe.hook_points("cross") == NAMES[::-1]
    assert recipe.hook_point("cross") == NAMES[2]
    with pytest.raises(
        ConfigError, match=r"train.cross.hook_points: found model.layers.0, 'crosscoder_batchtopk' needs"
    ):
        load_recipe(recipe_file, ['cache.hook_points=["model.layers.0"]'])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('train.cross.hook_points=["model.layers.0","model.layers.7"]', "found 'model.layers.7', the cache has"),
        ('train.cross.hook_points=["model.layers.0","model.layers.0"]', "needs at least two different ones"),
        (
            'train.cross.hook_points=["model.layers.0"]',
            "found model.layers.0, 'crosscoder_batchtopk' needs at least two",
        ),
        ('train.cross.training.objective={kind="e2e"}', "found 'crosscoder_batchtopk', needs an SAE of one hook point"),
        ("train.cross.hook_point=model.layers.0", "'crosscoder_batchtopk' takes hook_points"),
        ("train.cross.sae.num_sites=2", r"train.cross.sae.num_sites: found 2, hook_points are 3; leave it out"),
        ("train.all.sae.num_sites=1", "needs at least 2 hook points"),
        ("train.all.target_hook_point=model.layers.2", "only a transcoder takes one"),
        ("train.cross.sae.apply_b_dec_to_input=true", "apply_b_dec_to_input"),
        ("train.all.sae.kind=topk", "'topk' takes one hook_point"),
        ("train.all.sae.kind=multilayer", "unknown kind 'multilayer', needs one of"),
        ("train.cross.sae.kind=crosscoder", r"unknown kind 'crosscoder'.* needs one of"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file, [HOOK_POINTS, override])
    assert "\n" not in str(caught.value)


def test_an_sae_goes_on_from_one_of_the_same_hook_points_alone(recipe_file: Path) -> None:
    text = recipe_file.read_text(encoding="utf-8").replace("[train.all]\n", '[train.all]\nstart_from = "cross"\n')
    start, end = text.index("[train.all.sae]"), text.index("[train.all.training]")
    cross = text[text.index("[train.cross.sae]") : text.index("[train.cross.training]")]
    text = text[:start] + cross.replace("cross", "all", 1) + text[end:]
    recipe_file.write_text(
        text.replace("[train.all.training]", '[train.all.training]\ninit = "given"'), encoding="utf-8"
    )
    cached = f"cache.hook_points={json.dumps(NAMES)}"
    with pytest.raises(ConfigError, match=r"train.all.start_from: 'cross' has another sae table or hook point"):
        load_recipe(recipe_file, [cached])
    same = f"train.all.hook_points={json.dumps(NAMES)}"
    assert load_recipe(recipe_file, [cached, same]).train["all"].start_from == "cross"


def test_hook_points_of_different_widths_are_refused(recipe_file: Path) -> None:
    pipeline = Pipeline.load(
        recipe_file, [HOOK_POINTS, 'train.cross.hook_points=["model.layers.1","model.layers.1.mlp.gate_proj"]']
    )
    pipeline.cache()
    message = r"widths differ \(model.layers.1 32, model.layers.1.mlp.gate_proj 64\), needs hook points of one width"
    with pytest.raises(ConfigError, match=message):
        pipeline.train("cross")
    wrong = Pipeline.load(recipe_file, [HOOK_POINTS, "train.cross.sae.d_in=31", f"out={recipe_file.parent / 'other'}"])
    with pytest.raises(ConfigError, match=r"train.cross.sae.d_in: found 31, 'model.layers.0' of .* is 32 wide"):
        wrong.cache()
