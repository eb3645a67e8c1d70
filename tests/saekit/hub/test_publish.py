"""Publishing: one commit, a card that says what the folder knows and no more, exports that load; every refusal one line."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from saekit.errors import ConfigError, FormatError
from saekit.hub import dictionary_info, load_sae, plan_push, push
from saekit.manifest import begin_stage, file_sha256, finish_stage, manifest_sha256
from saekit.sae import JumpReLUConfig, JumpReLUSAE, TopKConfig, TopKSAE
from tests.saekit.hub.conftest import FIXTURES
from tests.saekit.hub.hub_server import TOKEN, HubServer

# The client's older upload calls its HTTP library in a way that the library's newest version does not like.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

MODEL, TEXT = "some/model", "monology/pile-uncopyrighted"


def trained(run: Path, *, model: str = MODEL, text: dict[str, Any] | None = None) -> Path:
    """Makes the folders of a finished run: a cache's manifest and an SAE's; returns the SAE's."""
    cache, folder = run / "cache", run / "train" / "topk"
    begin_stage(cache, "cache", {"model": {"name": model}, "text": text or {"kind": "huggingface", "name": TEXT}})
    finish_stage(cache, {"tokens": 5000})
    begin_stage(folder, "train", {"sae": {}}, {"cache": manifest_sha256(cache)})
    source = {"model": model, "trained_tokens": 4096}
    TopKSAE(TopKConfig(d_in=16, d_sae=48, k=4), hook_point="model.layers.3", seed=1, source=source).save(folder)
    finish_stage(folder, {"tokens": 4096, "steps": 8, "fvu": 0.25, "l0": 4.0})
    return folder


@pytest.fixture
def logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The hub with the model's and the text's repositories, and a login."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add(MODEL, {"config.json": b"{}"}, card={"license": "apache-2.0"})
    hub.add(f"datasets/{TEXT}", {"a.txt": b"x"}, card={"license": "mit"})
    return hub


def header_of(card: str) -> dict[str, Any]:
    header: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return header


def test_pushed_dictionary_loads_from_the_hub(logged_in: HubServer, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    url = push(folder, "me/mine", licence="cc-by-4.0")
    assert re.fullmatch(rf"{logged_in.url}/me/mine/commit/[0-9a-f]{{40}}", url)
    sae = load_sae("me/mine")
    assert torch.equal(sae.W_dec, load_sae(folder).W_dec)
    assert (sae.source["format"], sae.source["repo"], sae.source["model"]) == ("saekit", "me/mine", MODEL)
    assert sae.source["revision"] == logged_in.repos["me/mine"].refs["main"]
    assert sae.source["files"]["sae.safetensors"] == file_sha256(folder / "sae.safetensors")  # type: ignore[index]
    held = logged_in.repos["me/mine"].commits[logged_in.repos["me/mine"].refs["main"]]
    assert sorted(held) == [".gitattributes", "README.md", "cfg.json", "sae.safetensors"]
    assert len(logged_in.repos["me/mine"].commits) == 2, "one for the repository, one for everything in it"
    info = dictionary_info("me/mine")
    assert (info.format, info.model, info.hook_point) == ("saekit", MODEL, "model.layers.3")


def test_card_says_what_the_run_knows(logged_in: HubServer, tmp_path: Path) -> None:
    card = plan_push(trained(tmp_path / "run"), "me/mine", licence="cc-by-4.0").card
    assert header_of(card) == {
        "library_name": "saekit",
        "license": "cc-by-4.0",
        "base_model": MODEL,
        "datasets": [TEXT],
        "tags": ["interpretability", "saekit", "sparse-autoencoder", "topk"],
    }
    for line in (
        "A topk sparse autoencoder of 48 features that reads `model.layers.3` of [some/model]",
        f"trained on 4,096 tokens of {TEXT}, split train",
        "| training tokens, steps | 4,096, 8 |",
        "| licence of some/model | apache-2.0 |",
        f"| licence of {TEXT} | mit |",
        "| FVU on held-out tokens | 0.25 |",
        'sae = sk.load_sae("me/mine")',
        "`saekit convert me/mine dictionary --to saelens` (or sparsify, dictionary_learning)",
    ):
        assert line in card, line
    assert logged_in.asked("^(POST|PUT)") == []


def test_card_of_a_bare_folder_claims_nothing(hub: HubServer, tmp_path: Path) -> None:
    JumpReLUSAE(JumpReLUConfig(d_in=6, d_sae=10, target_l0=2.0)).save(tmp_path)
    card = plan_push(tmp_path, "me/mine").card
    assert set(header_of(card)) == {"library_name", "tags"}
    for word in ("None,", "null", "trained on", "licence", "| text"):
        assert word not in card
    assert "None came with it." in card
    assert hub.requests == []


def test_card_does_not_take_another_runs_cache_for_its_own(logged_in: HubServer, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "cache")
    begin_stage(tmp_path / "run" / "cache", "cache", {"text": {"kind": "huggingface", "name": "other/text"}})
    finish_stage(tmp_path / "run" / "cache", {"tokens": 1})
    card = plan_push(folder, "me/mine").card
    assert "other/text" not in card
    assert "trained on 4,096 tokens." in card


def test_folders_of_this_machine_are_not_published(logged_in: HubServer, tmp_path: Path) -> None:
    text = {"kind": "files", "paths": ["/home/somebody/secret/wiki.jsonl"]}
    folder = trained(tmp_path / "run", model="/home/somebody/models/SmolLM2", text=text)
    push(folder, "me/mine", also=["saelens", "dictionary_learning"])
    held = logged_in.repos["me/mine"].commits[logged_in.repos["me/mine"].refs["main"]]
    assert not [name for name, content in held.items() if b"somebody" in content]
    assert json.loads(held["cfg.json"])["source"]["model"] == "SmolLM2"
    assert b"wiki.jsonl" in held["README.md"]
    card = plan_push(folder, "me/mine", model="HuggingFaceTB/SmolLM2-135M").card
    assert header_of(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M"


def test_relative_folder_is_not_taken_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "SmolLM2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = plan_push(trained(tmp_path / "run", model="models/SmolLM2"), "me/mine").card
    assert "base_model" not in header_of(card)
    assert "| model | SmolLM2 |" in card


def test_exports_lie_beside_it_and_load(logged_in: HubServer, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    plan = plan_push(folder, "me/mine", also=["saelens", "sparsify"])
    assert {"saelens/cfg.json", "saelens/sae_weights.safetensors", "sparsify/sae.safetensors"} < set(plan.files)
    assert 'SAE.from_pretrained(release="me/mine", sae_id="saelens")' in plan.card
    assert 'SparseCoder.load_from_hub("me/mine", hookpoint="sparsify")' in plan.card
    push(folder, "me/mine", also=["saelens", "sparsify"])
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = load_sae("me/mine")(x).x_hat
    for target in ("saelens", "sparsify"):
        sae = load_sae(f"me/mine:{target}")
        assert sae.source["format"] == target
        assert torch.allclose(sae(x).x_hat, expected, atol=1e-5)


def test_metrics_of_an_evaluation_stand_in_the_card(hub: HubServer, tmp_path: Path) -> None:
    card = plan_push(
        trained(tmp_path / "run", model="m"), "me/mine", metrics="| | sae |\n|---|---|\n| FVU | 0.2 |\n"
    ).card
    assert "## Evaluation\n\n| | sae |" in card
    assert "end of training" not in card


def test_second_push_of_the_same_changes_nothing(logged_in: HubServer, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    push(folder, "me/mine")
    uploads = len(logged_in.asked("^PUT"))
    push(folder, "me/mine")
    assert uploads == 1
    assert len(logged_in.asked("^PUT")) == uploads


def test_private_repository_is_made_private(logged_in: HubServer, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run")
    push(folder, "me/secret", private=True)
    assert logged_in.repos["me/secret"].is_private
    push(folder, "me/open")
    with pytest.raises(ConfigError, match=r"'me/open' is there and public, needs a private one"):
        push(folder, "me/open", private=True)


def test_storm_of_errors_is_sat_out(logged_in: HubServer, tmp_path: Path, waits: list[float]) -> None:
    logged_in.fail("/api/repos/create", 503, times=2)
    logged_in.fail("^PUT", 503)
    push(trained(tmp_path / "run"), "me/mine")
    assert len(waits) == 3
    assert load_sae("me/mine").d_sae == 48


def test_without_a_login_it_says_how(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'me/mine': the hub says 401, needs a token .*'hf auth login' or set HF_TOKEN"
    ):
        push(trained(tmp_path / "run"), "me/mine")
    assert "me/mine" not in hub.repos


def test_offline_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set, needs a connection; unset it"):
        push(trained(tmp_path / "run"), "me/mine")


@pytest.mark.parametrize(
    ("folder", "repo", "also", "message"),
    [
        ("run", "mine", [], r"repository 'mine', needs owner/name"),
        ("run", "me/mine:sub", [], r"repository 'me/mine:sub', needs owner/name"),
        ("run", "me/mine", ["gguf"], r"format 'gguf', needs one of saelens, sparsify"),
        ("nowhere", "me/mine", [], r"no such folder"),
        (str(FIXTURES / "saelens_v6_topk"), "me/mine", [], r"files of 'saelens', needs a folder of saekit"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, folder: str, repo: str, also: list[str], message: str) -> None:
    trained(tmp_path / "x")
    place = tmp_path / "x" / "train" / "topk" if folder == "run" else tmp_path / folder
    with pytest.raises((ConfigError, FormatError), match=message) as caught:
        plan_push(place, repo, also=also)
    assert "\n" not in str(caught.value)


def test_unfinished_training_is_not_published(tmp_path: Path) -> None:
    begin_stage(tmp_path, "train", {})
    with pytest.raises(FormatError, match="training has not finished"):
        plan_push(tmp_path, "me/mine")


def test_what_a_target_cannot_express_is_refused_before_anything_is_sent(logged_in: HubServer, tmp_path: Path) -> None:
    JumpReLUSAE(JumpReLUConfig(d_in=6, d_sae=10, target_l0=2.0)).save(tmp_path)
    with pytest.raises(ConfigError, match="sparsify cannot express"):
        push(tmp_path, "me/mine", also=["sparsify"])
    assert logged_in.asked("^(POST|PUT)") == []
