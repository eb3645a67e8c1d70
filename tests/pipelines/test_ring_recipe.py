"""A recipe with a ring: what cannot be trained on one is refused, what it needs is told, and the rest of the run is as ever."""

import json
from pathlib import Path

import pytest
from saekit_pipelines.cli import app
from saekit_pipelines.recipe import load_recipe
from saekit_pipelines.stages import Pipeline
from saekit_pipelines.status import stage_rows
from typer.testing import CliRunner

from saekit.activations import RingView
from saekit.activations.fillers import RingKeeper
from saekit.activations.ring import Ring
from saekit.errors import ConfigError
from saekit.models import load_model
from saekit.training import ringed
from tests.saekit.activations.rings import ThreadFillers

SMALL = (
    "cache.num_tokens=1024",
    "cache.shard_tokens=512",
    "train.topk.training.num_tokens=1024",
    "train.jumprelu.training.num_tokens=512",
)
FINE_TUNED = """
[train.topk_kl]
start_from = "topk"
[train.topk_kl.sae]
kind = "topk"
d_sae = 64
k = 4
[train.topk_kl.training]
num_tokens = 512
batch_size = 256
init = "given"
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ring.disk=1k", "ring.disk: found '1k', needs a number of bytes"),
        ("ring.disc=1GB", "unknown key 'ring.disc'; did you mean 'disk'"),
        (
            "train.jumprelu.training.batch_size=128",
            r"train.jumprelu.training: batch_size 128, needs that of train.topk.training, 256: a ring is read once",
        ),
        ("storage.url=s3://bucket/folder", "ring: found storage.url 's3://bucket/folder' beside it, .* one of the two"),
        ("train.topk.training.objective={kind='e2e'}", "train.topk.training: objective 'e2e' reads whole rows again"),
    ],
)
def test_what_a_ring_cannot_serve_is_refused(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file, ["ring.disk=1GB", override])


def test_fine_tuning_on_a_ring_is_refused(recipe_file: Path) -> None:
    text = recipe_file.read_text(encoding="utf-8")
    recipe_file.write_text(
        text.replace("[label.token_change]", f"{FINE_TUNED}\n[label.token_change]"), encoding="utf-8"
    )
    load_recipe(recipe_file)
    with pytest.raises(ConfigError, match=r"train.topk_kl.start_from: found 'topk' on a ring, which is read once"):
        load_recipe(recipe_file, ["ring.disk=1GB"])


def test_plan_says_segments_disk_and_what_binds(recipe_file: Path) -> None:
    def planned(*arguments: str) -> dict[str, object]:
        result = CliRunner().invoke(app, ["plan", str(recipe_file), "--gpu", "cpu", "--json", *arguments])
        assert result.exit_code == 0, result.output
        found: dict[str, object] = json.loads(result.stdout)
        return found

    plain = planned()
    assert plain["ring"] is None
    shared = planned("--ring", "10MB")["ring"]
    apart = planned("--ring", "10MB", 'ring.devices=["cpu","cpu"]')["ring"]
    assert isinstance(shared, dict)
    assert isinstance(apart, dict)
    assert shared["sizes"]["disk"] == 10_000_000
    assert shared["sizes"]["kept_bytes"] + 2 * shared["sizes"]["segment_bytes"] <= 10_000_000
    # On one device both take their turns; on devices of their own the longer one is what counts.
    assert shared["hours"] == pytest.approx(shared["fill_hours"] + shared["train_hours"])
    assert apart["fill_hours"] == pytest.approx(shared["fill_hours"] / 2)
    assert apart["hours"] == max(apart["fill_hours"], apart["train_hours"])
    assert shared["bottleneck"] == ("filling" if shared["fill_hours"] > shared["train_hours"] else "training")
    result = CliRunner().invoke(app, ["plan", str(recipe_file), "--gpu", "cpu", "--ring", "10MB"])
    assert "disk  10.0 MB" in result.stdout
    assert f"{shared['bottleneck']} binds" in result.stdout
    too_small = CliRunner().invoke(app, ["plan", str(recipe_file), "--gpu", "cpu", "--ring", "10kB"])
    assert too_small.exit_code == 2
    assert "error: ring.disk: found 10,000 bytes, needs at least" in too_small.stderr


def test_saes_are_trained_on_a_ring_and_measured_on_the_cache(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file)
    lm, fillers = load_model(recipe.cache.model), []

    def keeper(ring: Ring) -> ThreadFillers:
        RingKeeper(ring).close()
        fillers.append(ThreadFillers(ring, lm))
        return fillers[-1]

    monkeypatch.setattr(ringed, "RingKeeper", keeper)
    runner = CliRunner()
    dry = runner.invoke(app, ["run", str(recipe_file), *SMALL, "--ring", "2MB", "--dry-run"])
    assert "ring" in dry.stdout
    assert "segments of" in " ".join(dry.stdout.split())
    assert runner.invoke(app, ["cache", str(recipe_file), *SMALL]).exit_code == 0
    result = runner.invoke(app, ["train", str(recipe_file), *SMALL, "--ring", "2MB"])
    assert result.exit_code == 0, result.output
    assert len(fillers) == 1
    pipeline = Pipeline.load(recipe_file, [*SMALL, "ring.disk=2MB"])
    assert {row[0]: row[1] for row in stage_rows(pipeline.folder)} | {"report": "missing"} == {
        "cache": "finished",
        "ring": "finished",
        "train/topk": "finished",
        "train/jumprelu": "finished",
        "label": "missing",
        "evaluate": "missing",
        "report": "missing",
    }
    assert not list((pipeline.folder / "ring").glob("segment-*"))
    # Other stages read the cache, and know the SAE as one of the recipe's.
    assert not any(isinstance(view, RingView) for view in pipeline.views("topk"))
    assert pipeline.sae("topk").hook_point == "model.layers.1"
    again = runner.invoke(app, ["train", str(recipe_file), *SMALL, "--ring", "2MB"])
    assert "already trained" in again.output
    assert not fillers[-1].jobs
    other = runner.invoke(app, ["train", str(recipe_file), *SMALL, "--ring", "9MB"])
    assert other.exit_code == 2
    assert "ring.disk (2000000 there, 9000000 asked)" in other.stderr
