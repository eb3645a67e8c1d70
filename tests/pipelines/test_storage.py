"""A recipe whose activations lie on an object store: written, checked and trained on by the commands, on any machine."""

import shutil
from pathlib import Path

import pytest
from saekit_pipelines.cli import app
from saekit_pipelines.randomised import randomised_recipe
from saekit_pipelines.recipe import load_recipe
from typer.testing import CliRunner, Result

from saekit.manifest import manifest_sha256
from tests.saekit.activations.remote.conftest import here, s3_port, url
from tests.saekit.activations.remote.servers import SECRET, files

__all__ = ["here", "s3_port", "url"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_stages_work_on_activations_elsewhere(url: str, recipe_file: Path, tmp_path: Path) -> None:
    text = recipe_file.read_text(encoding="utf-8").replace("num_tokens = 4096", "num_tokens = 2048")
    recipe_file.write_text(text, encoding="utf-8")
    storage, run = f"storage.url={url}", tmp_path / "run"
    result = invoke("cache", recipe_file, storage)
    assert result.exit_code == 0, result.output
    assert f"to upload to {url}; up to" in result.output.replace("\n", " ")
    assert not list(run.rglob("c/0/0/0"))
    assert invoke("verify", url).stdout == f"{url}: every shard is as it was written\n"
    assert invoke("verify", run / "cache").exit_code == 0
    assert invoke("train", recipe_file, storage, "--sae", "topk").exit_code == 0
    other = tmp_path / "another machine"
    assert invoke("train", recipe_file, storage, "--sae", "topk", f"out={other}").exit_code == 0
    assert manifest_sha256(run / "train/topk") == manifest_sha256(other / "train/topk")
    # Brought home, it is the same cache: the finished SAE is that of it.
    assert invoke("cache", recipe_file, f"out={tmp_path / 'home'}").exit_code == 0
    shutil.copytree(run / "train", tmp_path / "home" / "train")
    result = invoke("train", recipe_file, "--sae", "topk", f"out={tmp_path / 'home'}")
    assert "was finished already" in result.output.replace("\n", " ")
    with files(tmp_path / "home/cache") as web:
        result = invoke("train", recipe_file, f"storage.url={web}", f"out={other}", "cache.dtype=float32")
        assert result.exit_code == 2
        assert "dtype" in result.stderr
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_plans_say_what_is_sent(recipe_file: Path, tmp_path: Path) -> None:
    result = invoke("cache", recipe_file, "storage.url=gs://bucket/a", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "to upload to gs://bucket/a; up to" in result.output.replace("\n", " ")
    assert not (tmp_path / "run").exists()
    result = invoke("plan", recipe_file, "storage.url=gs://bucket/a", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    assert "to upload to gs://bucket/a" in result.output


def test_control_with_random_weights_has_a_folder_of_its_own(recipe_file: Path) -> None:
    control = randomised_recipe(load_recipe(recipe_file, ["storage.url=s3://bucket/a/"]))
    assert control.storage is not None
    assert control.storage.url == "s3://bucket/a/random_weights"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["verify", "s3//bucket/a"], "no cache there"),
        (["verify", "ftp://bucket/a"], "needs a URL that begins with s3://"),
        (["cache", "RECIPE", "storage.url=https://me:word@host/a"], "given with a user, password or query"),
        (["cache", "RECIPE", "storage.url=http://127.0.0.1:9/a"], "can only be read"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(command: list[str], said: str, recipe_file: Path, here: None) -> None:
    result = invoke(*(recipe_file if word == "RECIPE" else word for word in command))
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
