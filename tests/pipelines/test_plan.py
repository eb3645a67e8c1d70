"""`saekit plan`: every recipe, without weights, network or anything written."""

import json
from pathlib import Path
from typing import Any

import pytest
from saekit_pipelines.cli import app
from saekit_pipelines.planning import RecipePlan, plan_recipe
from saekit_pipelines.recipe import load_recipe
from typer.testing import CliRunner, Result

from saekit.activations import plan_cache
from saekit.training.hardware import find_hardware

RECIPES = sorted((Path(__file__).parents[2] / "pipelines" / "recipes").glob("*.toml"))
FOLDER = RECIPES[0].parent


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def planned(recipe: Path | str, *overrides: str, gpu: str = "h200", num_nodes: int = 1, **rates: float) -> RecipePlan:
    path = FOLDER / f"{recipe}.toml" if isinstance(recipe, str) else recipe
    hardware = find_hardware(gpu, rates)
    return plan_recipe(load_recipe(path, overrides), hardware, num_nodes=num_nodes, arguments=["R.toml", *overrides])


@pytest.mark.parametrize("gpu", ["cpu", "h200"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned(path: Path, gpu: str, tmp_path: Path) -> None:
    result = invoke(path, f"out={tmp_path / 'run'}", "--gpu", gpu, "--nodes", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["hours"] > 0
    assert found["figures"].startswith("predicted, not measured" if gpu == "h200" else "predicted from rates measured")
    assert set(found["train"]) == set(load_recipe(path).train)
    assert all(sae["tokens_per_second"] > 0 for sae in found["train"].values())
    assert list(tmp_path.iterdir()) == []


def test_widths_of_every_kind_are_the_models() -> None:
    crosscoder = planned("gpt2_resid_crosscoder").train[0].plan.shape
    assert (crosscoder.width_in, crosscoder.width_out, crosscoder.batch_width) == (3072, 3072, 3072)
    mlsae = planned("gpt2_resid_crosscoder", "train.crosscoder.sae.kind=mlsae").train[0].plan.shape
    assert (mlsae.width_in, mlsae.samples, mlsae.batch_width) == (768, 4, 3072)
    transcoder = planned("gpt2_mlp8_transcoder").train[0].plan.shape
    assert transcoder.num_trained == 24_576 * (2 * 768 + 1) + 768 + 768 * 768


def test_disk_is_what_the_dry_run_says(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    there = plan_cache(recipe.cache, tmp_path / "run" / "cache")
    size = planned(recipe_file, gpu="cpu").cache.size
    assert (size.size_bytes, size.num_rows, size.num_tokens) == (there.size_bytes, there.num_rows, there.num_tokens)


def test_output_names_figures_layout_and_commands() -> None:
    result = invoke(FOLDER / "llama3_8b_resid15_batchtopk.toml", "--gpu", "h200", "--reader-gb-s", 50)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "1 x 8 H200 SXM 141 GB: speeds are predicted, not measured"
    assert any(line.startswith("train batchtopk 536,940,544 8 1,000,000,000 ") for line in lines)
    assert any(line.startswith("batchtopk 2.15 GB 4.30 GB 2.15 GB ") for line in lines)
    assert any(line.startswith("layout batchtopk: data-parallel over 8 processes") for line in lines)
    assert any(line.startswith("disk 821.11 GB") for line in lines)
    recipe = FOLDER / "llama3_8b_resid15_batchtopk.toml"
    assert lines[lines.index("commands") + 1 :] == [
        f"saekit cache {recipe}",
        f"accelerate launch --multi_gpu --num_machines 1 --num_processes 8 -m saekit_pipelines train {recipe}",
        f"saekit run {recipe}",
    ]


def test_several_nodes_are_launched_by_slurm() -> None:
    fast = {"reader_gb_s": 1e3, "mixer_gb_s": 1e3, "disk_gb_s": 1e3}
    plan = planned("llama3_8b_resid15_batchtopk", "train.batchtopk.training.batch_size=262144", num_nodes=2, **fast)
    assert plan.commands[1] == (
        "sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh train R.toml"
        " train.batchtopk.training.batch_size=262144"
    )


def test_saes_of_different_layouts_are_launched_apart() -> None:
    # The network is too slow for the gradients of small batches.
    plan = planned("gpt2_resid8_e2e", "train.topk.training.batch_size=512")
    assert [stage.plan.step.num_processes for stage in plan.train] == [1, 8]
    recipe = "R.toml train.topk.training.batch_size=512"
    assert plan.commands == (
        f"saekit cache {recipe}",
        f"saekit train {recipe} --sae topk",
        f"accelerate launch --multi_gpu --num_machines 1 --num_processes 8 -m saekit_pipelines train {recipe} --sae topk_kl",
        f"saekit run {recipe}",
    )


def test_a_sweep_is_trained_on_one_read_where_that_is_faster() -> None:
    slow = planned("gpt2_resid8_sweep", reader_gb_s=0.1, gpus_per_node=1)
    (group,) = slow.together
    assert len(group.names) == 9
    assert group.device_bytes == sum(stage.plan.memory_alone.device for stage in slow.train)
    # The read takes as long for nine as for one.
    assert group.hours == pytest.approx(group.hours_alone / 9)
    assert slow.commands == ("saekit run R.toml --together",)
    assert slow.hours == pytest.approx(slow.cache.hours + group.hours)
    apart = planned("gpt2_resid8_sweep", reader_gb_s=0.1, gpus_per_node=1, memory_gb=5.0)
    assert not apart.together[0].fits
    assert "--together" not in apart.commands[-1]


def test_finished_stages_take_no_time(recipe_file: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["cache", str(recipe_file)]).exit_code == 0
    assert runner.invoke(app, ["train", str(recipe_file), "--sae", "topk"]).exit_code == 0
    plan = planned(recipe_file, gpu="cpu")
    assert plan.cache.hours == 0
    assert [stage.hours > 0 for stage in plan.train] == [False, True]
    table = invoke(recipe_file, "--gpu", "cpu").stdout
    assert [line.split()[0] for line in table.splitlines() if " finished " in line] == ["cache", "train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "plan: found gpu 'h1000', needs one of cpu, h100, h200"),
        (["--nodes", "0"], "plan: found 0 nodes, needs at least one"),
        (["--gpu", "h100", "--memory-gb", "-3"], "memory_gb: found -3.0"),
        (["cache.model.name=./nowhere"], "no such folder"),
        (['cache.hook_points=["model.layers.99"]'], "has no such module"),
        (["--width", "100", "train.topk.sae.d_in=64"], "d_in is 64, needs the activations' width 100"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: list[str], message: str) -> None:
    result = invoke(FOLDER / "quickstart.toml", *arguments)
    assert result.exit_code == 2, result.output
    errors: list[Any] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    result = invoke(
        FOLDER / "quickstart.toml", "cache.num_tokens=100_000_000_000", f"out={tmp_path}", "--disk", tmp_path
    )
    assert "does not fit" in result.stdout
