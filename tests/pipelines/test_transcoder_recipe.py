"""A recipe with a transcoder: from the model to a trained folder and a report, and the mistakes in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saekit_pipelines.recipe import load_recipe
from saekit_pipelines.stages import Pipeline

from saekit.activations import PairedStore, StoreView
from saekit.errors import ConfigError, DataError
from saekit.evaluation import evaluate, read_evaluation
from saekit.labelling import label_features
from saekit.labelling.contexts import FeatureContexts
from saekit.labelling.evidence.effects import TokenEffects
from saekit.manifest import read_manifest
from saekit.models import find_unembedding
from saekit.sae import TopKConfig, Transcoder, build_sae, load_sae_folder
from saekit.training import read_metrics

HOOK_POINTS = 'cache.hook_points=["model.layers.1.mlp:input","model.layers.1.mlp"]'
OVERRIDES = [HOOK_POINTS, "evaluate.num_tokens=100000"]
TABLES = """
[train.mlp]
hook_point = "model.layers.1.mlp:input"
target_hook_point = "model.layers.1.mlp"
[train.mlp.sae]
kind = "transcoder"
d_sae = 64
k = 4
has_skip = true
[train.mlp.training]
num_tokens = 8192
batch_size = 128
lr = 3e-3
"""


@pytest.fixture
def recipe_file(recipe_file: Path, with_saes: Callable[[Path, str], Path]) -> Path:
    """The recipe with a transcoder in place of its SAEs."""
    return with_saes(recipe_file, TABLES)


def test_recipe_with_a_transcoder_runs_to_its_report(recipe_file: Path) -> None:
    pipeline = Pipeline.load(recipe_file, OVERRIDES)
    index = pipeline.run()
    assert index.is_file()
    folder = pipeline.stage_folder("train", "mlp")
    sae = load_sae_folder(folder)
    assert isinstance(sae, Transcoder)
    assert sae.hook_point == "model.layers.1.mlp:input"
    assert sae.source["target_hook_point"] == "model.layers.1.mlp"
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.config["target_hook_point"] == "model.layers.1.mlp"
    _, test = pipeline.views("mlp")
    pairs = test.read(test.indices)
    x, y = pairs[:, : sae.d_in], pairs[:, sae.d_in :]
    fvu = float(((y - sae(x).x_hat).square().sum() / (y - y.mean(0)).square().sum()).detach())
    assert fvu < 0.8
    rows = [row for row in read_metrics(folder) if row["split"] == "test"]
    assert rows[-1]["fvu"] == pytest.approx(fvu, rel=0.05)

    evaluation = read_evaluation(pipeline.stage_folder("evaluate", "mlp"))
    assert evaluation.hook_point == "model.layers.1.mlp"
    assert evaluation.fvu == pytest.approx(fvu, rel=1e-4)
    assert [row.name for row in evaluation.rows] == ["sae", "mean", "linear"]
    assert evaluation.value("fvu", row="mean") == pytest.approx(1.0)
    linear = evaluation.value("fvu", row="linear")
    assert linear is not None
    assert 0 < linear < 1
    assert evaluation.value("ce") is not None

    train, test = pipeline.views("mlp")
    contexts = FeatureContexts.open(pipeline.stage_folder("label", "mlp") / "contexts")
    acts = sae.encode(train.read(train.indices)[:, : sae.d_in])
    torch.testing.assert_close(torch.from_numpy(contexts.firing_count), (acts > 0).sum(0))
    projected = TokenEffects.open(pipeline.stage_folder("label", "mlp") / "effects-vocabproj.safetensors")
    feature = int(projected.features[0])
    logits = find_unembedding(pipeline.lm).project(sae.W_dec[feature][None])[0]
    assert projected.promoted(feature)[0][0] == int(logits.argmax())
    assert (pipeline.stage_folder("label", "mlp") / "effects-tokenchange.safetensors").is_file()

    store = pipeline.store("mlp")
    assert isinstance(store, PairedStore)
    alone = [StoreView(store.inputs, view.mask) for view in (train, test)]
    with pytest.raises(
        ConfigError, match=r"evaluate: .* gives activations 32 wide, a transcoder needs pairs 32 and 32"
    ):
        evaluate(sae, alone[1], lm=pipeline.lm)
    with pytest.raises(DataError, match=r"labels: .* are 32 wide, the dictionary needs 64 \(pairs of a PairedStore\)"):
        label_features(sae, alone[0], test=alone[1], lm=pipeline.lm, out=pipeline.folder / "labels")
    plain = build_sae(TopKConfig(d_in=64, d_sae=70, k=3))
    with pytest.raises(ConfigError, match=r"evaluate: the SAE has d_in 64, .* evaluate it where it was trained"):
        evaluate(plain, test)
    again = Pipeline.load(recipe_file, OVERRIDES)
    assert again.run() == index
    assert list(again.metric_tables()) == ["mlp"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.mlp.sae.kind=topk", "train.mlp.sae.has_skip=true"], "unknown key"),
        (["train.mlp.target_hook_point=model.layers.0"], "target_hook_point: found 'model.layers.0', the cache has"),
        (["train.mlp.sae.apply_b_dec_to_input=true"], "apply_b_dec_to_input"),
    ],
)
def test_mistakes_are_one_line(recipe_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file, [HOOK_POINTS, *overrides])
    assert "\n" not in str(caught.value)


def test_transcoder_needs_a_target_and_nothing_else_takes_one(recipe_file: Path) -> None:
    text = recipe_file.read_text(encoding="utf-8")
    line = 'target_hook_point = "model.layers.1.mlp"\n'
    recipe_file.write_text(text.replace(line, ""), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train.mlp.target_hook_point: found None, a transcoder needs one"):
        load_recipe(recipe_file, [HOOK_POINTS])
    plain = text.replace('kind = "transcoder"', 'kind = "topk"').replace("has_skip = true\n", "")
    recipe_file.write_text(plain, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"found 'model.layers.1.mlp', only a transcoder takes one"):
        load_recipe(recipe_file, [HOOK_POINTS])
