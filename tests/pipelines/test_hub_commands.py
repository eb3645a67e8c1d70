"""ls, info, pull and push as a user runs them, against a local hub."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saekit_pipelines.cli import app
from typer.testing import CliRunner, Result

from saekit import load_sae
from saekit.evaluation import Evaluation, EvaluationRow, FeatureMeasures, Figure, Histogram, sae_fingerprint
from saekit.evaluation.definitions import METRICS
from saekit.evaluation.record import write_evaluation
from saekit.manifest import begin_stage, finish_stage
from saekit.sae import TopKConfig, TopKSAE
from tests.saekit.hub.conftest import FIXTURES
from tests.saekit.hub.hub_server import TOKEN, HubServer

REPO, SAE = "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def output(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def scope(hub: HubServer) -> HubServer:
    """The hub with two dictionaries of Gemma Scope."""
    content = (FIXTURES / "gemmascope_res" / SAE / "params.npz").read_bytes()
    names = (SAE, "layer_20/width_16k/average_l0_139")
    hub.add(REPO, {f"{name}/params.npz": content for name in names}, card={"license": "cc-by-4.0"})
    return hub


def test_ls_shows_the_releases() -> None:
    text = output("ls", "--limit", "0")
    assert re.search(r"gemma-scope-2b-pt-res +gemma-scope +google/gemma-2-2b +sae +resid_post, embed +60\b", text)
    assert len(text.splitlines()) > 100


def test_ls_shows_what_fits_and_how_many_more() -> None:
    result = invoke("ls", "--model", "gemma-2-2b", "--width", "16k", "--site", "mlp_out", "--limit", "2")
    assert result.stdout.splitlines()[1].startswith("gemma-scope-2b-pt-mlp/layer_0/width_16k")
    assert len(result.stdout.splitlines()) == 3
    assert "24 more; --limit 0 shows all" in result.stderr


def test_ls_as_json_has_everything() -> None:
    rows = json.loads(output("ls", "--family", "qwen-scope", "--l0", "50", "--json"))
    assert len(rows) == 28 + 36 + 48 + 24 + 32 + 64 + 40
    assert rows[0] == {
        "name": "qwen-scope-qwen3-1.7b-base-w32k-l50/layer_0",
        "family": "qwen-scope",
        "ref": "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50:layer0.sae.pt",
        "model": "Qwen/Qwen3-1.7B-Base",
        "kind": "sae",
        "site": "resid_post",
        "layer": 0,
        "width": "32k",
        "l0": "50",
        "below": None,
        "d_sae": 32768,
    }


@pytest.mark.usefixtures("scope")
def test_ls_of_a_name_asks_the_hub_what_no_rule_can_say() -> None:
    text = output("ls", "gemma-scope-2b-pt-res/layer_20/width_16k")
    assert text.split()[2::2] == [f"{REPO}:layer_20/width_16k/average_l0_139", f"{REPO}:{SAE}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "gemma-scope-2b-pt-res", "--model", "x"], "'gemma-scope-2b-pt-res' and a filter, needs one of them"),
        (["ls", "--model", "no-such-model"], "no known dictionary fits"),
        (["info", "/nowhere/at/all"], "no such folder"),
        (["pull", "/nowhere/at/all"], "no such folder"),
        (["push", "/nowhere", "me/mine"], "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_info_says_what_it_is_and_downloads_nothing(scope: HubServer) -> None:
    text = output("info", f"gemma-scope-2b-pt-res/{SAE}")
    for fact in (
        r"hook point +model\.layers\.20\b",
        r"input -> features +32 -> 128",
        r"licence +cc-by-4.0",
        "jumprelu",
    ):
        assert re.search(fact, text), fact
    assert not list((Path(_cache()) / "hub").rglob("params.npz"))
    facts: dict[str, Any] = json.loads(output("info", f"{REPO}:{SAE}", "--json"))
    assert facts["tensors"]["W_enc"] == ["float32", [32, 128]]


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent


def test_pull_prints_where_it_is(scope: HubServer, tmp_path: Path) -> None:
    result = invoke("pull", f"{REPO}:{SAE}", "--to", tmp_path / "mine")
    assert result.stdout.strip() == str(tmp_path / "mine")
    assert "35.2k/35.2k bytes" in result.stderr
    assert load_sae(tmp_path / "mine").hook_point == "model.layers.20"
    folder = Path(output("pull", REPO, "--pattern", "*_l0_139").strip())
    assert (folder / "params.npz").is_file()


def trained(run: Path, evaluate: Callable[[Path], None] | None = None) -> Path:
    folder = run / "train" / "topk"
    begin_stage(folder, "train", {})
    TopKSAE(TopKConfig(d_in=8, d_sae=16, k=2), hook_point="model.layers.1", source={"model": "some/model"}).save(folder)
    finish_stage(folder, {"tokens": 100, "steps": 1})
    if evaluate is not None:
        evaluate(folder)
    return folder


def _evaluated(folder: Path) -> None:
    """Writes the evaluation of an SAE where a run has it."""
    row = EvaluationRow(name="sae", title="SAE", metrics={name: Figure(value=0.25) for name in METRICS})
    counts = {name: 7 for name in Evaluation.model_fields if name.startswith("num_")}
    measures = FeatureMeasures(
        density=np.zeros(16, np.float32),
        decoder_max_cosine=np.zeros(16, np.float32),
        neighbor_indices=np.zeros((16, 8), np.int32),
        neighbor_cosines=np.zeros((16, 8), np.float32),
    )
    evaluation = Evaluation(
        hook_point="model.layers.1",
        rows=(row,),
        density=Histogram(),
        decoder_cosine=Histogram(),
        definitions={},
        features=measures,
        **counts,  # type: ignore[arg-type]  # the counts by name
    )
    near = folder.parent.parent / "evaluate" / folder.name
    begin_stage(near, "evaluate", {}, {"sae": sae_fingerprint(load_sae(folder))})
    write_evaluation(near, evaluation)
    finish_stage(near, {})


@pytest.mark.usefixtures("hub")
def test_dry_run_shows_card_and_files(tmp_path: Path) -> None:
    result = invoke("push", trained(tmp_path), "me/mine", "--also", "saelens", "--licence", "mit", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("---\n")
    assert "license: mit" in result.stdout
    assert re.search(r"\d+  saelens/sae_weights.safetensors", result.stderr)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_push_publishes_with_the_runs_own_evaluation(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = trained(tmp_path, _evaluated)
    url = output("push", folder, "me/mine").strip().splitlines()[-1]
    assert url.startswith(f"{hub.url}/me/mine/commit/")
    card = hub.repos["me/mine"].commits[hub.repos["me/mine"].refs["main"]]["README.md"].decode()
    assert "## Evaluation\n\n| " in card
    assert "0.25" in card
    assert torch.equal(load_sae("me/mine").W_dec, load_sae(folder).W_dec)


@pytest.mark.usefixtures("hub")
def test_evaluation_of_another_dictionary_is_not_taken(tmp_path: Path) -> None:
    folder = trained(tmp_path, _evaluated)
    TopKSAE(TopKConfig(d_in=8, d_sae=16, k=2), hook_point="model.layers.1", seed=9).save(folder)
    assert "## Evaluation\n\n| " not in output("push", folder, "me/mine", "--dry-run")
    named = output("push", folder, "me/mine", "--dry-run", "--evaluation", tmp_path / "evaluate" / "topk")
    assert "## Evaluation\n\n| " in named
