"""The hub's client, real, against a server that behaves like the hub: what is asked for, kept, resumed and refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from saekit.errors import FormatError, ResourceError
from saekit.hub import load_sae, load_saes
from tests.saekit.hub.conftest import FIXTURES
from tests.saekit.hub.hub_server import TOKEN, HubServer

REPO = "google/gemma-scope-2-1b-pt"
RESID = "resid_post/layer_13_width_16k_l0_medium"
TRANSCODER = "transcoder/layer_13_width_16k_l0_big"
WEIGHTS = f"{RESID}/params.safetensors"


@pytest.fixture
def released(hub: HubServer, tmp_path: Path) -> HubServer:
    """The hub with two dictionaries of Gemma Scope 2."""
    for name in ("gemmascope2_resid", "gemmascope2_transcoder"):
        for folder in (FIXTURES / name).iterdir():
            if folder.is_dir():
                shutil.copytree(folder, tmp_path / "repo" / folder.name)
    hub.add(REPO, tmp_path / "repo", card={"license": "cc-by-4.0"})
    return hub


def contents(hub: HubServer) -> list[str]:
    """Returns the files whose content was asked for."""
    return [re.sub(r".*/resolve/\w+/", "", line) for line in hub.asked("^GET .*/resolve/")]


def test_only_the_needed_files_are_downloaded(released: HubServer) -> None:
    with pytest.raises(FormatError, match=rf"holds 2 SAE folders, needs one; use '{REPO}:resid_post/layer_13"):
        load_sae(REPO)
    assert contents(released) == []
    sae = load_sae(f"{REPO}:{TRANSCODER}")
    assert contents(released) == [f"{TRANSCODER}/params.safetensors", f"{TRANSCODER}/config.json"]
    assert sae.source["revision"] == released.repos[REPO].refs["main"]
    assert load_sae(f"{REPO}:{TRANSCODER}/params.safetensors").hook_point == sae.hook_point
    assert len(contents(released)) == 2
    assert list(load_saes(REPO, pattern="resid_post/*")) == [RESID]


def test_a_folder_of_a_large_repository_is_listed_page_by_page_and_alone(released: HubServer) -> None:
    released.page_size = 1
    load_sae(f"{REPO}:{RESID}")
    trees = released.asked("/tree/")
    assert len(trees) == 2
    assert all(f"/{RESID}?" in line for line in trees)


def test_storage_on_another_host_never_sees_the_token(released: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load_sae(f"{REPO}:{RESID}")
    stored = [request for request in released.requests if request.path.startswith("/storage/")]
    assert stored
    assert not any(request.has_token for request in stored)
    assert all(request.has_token for request in released.requests if request not in stored)


@pytest.mark.parametrize("times", [1, 3])
def test_cut_connection_is_resumed_where_it_ended(released: HubServer, waits: list[float], times: int) -> None:
    size = len(released.repos[REPO].commits[released.repos[REPO].refs["main"]][WEIGHTS])
    released.cut("/storage/", after=1000, times=times)
    sae = load_sae(f"{REPO}:{RESID}")
    assert torch.equal(sae.W_dec, load_sae(FIXTURES / "gemmascope2_resid" / RESID).W_dec)
    ranges = [request.range for request in released.requests if request.path.startswith("/storage/")]
    assert ranges == [None, *(f"bytes={1000 * n}-" for n in range(1, times + 1))]
    assert size > 1000 * times
    assert len(waits) == times


def test_download_that_was_killed_goes_on_in_the_next_process(released: HubServer, waits: list[float]) -> None:
    released.cut("/storage/", after=1000)
    released.fail("/storage/", 403)
    with pytest.raises(FormatError, match=r"the hub says 403"):
        load_sae(f"{REPO}:{RESID}")
    released.requests.clear()
    sae = load_sae(f"{REPO}:{RESID}")
    assert [request.range for request in released.requests if request.path.startswith("/storage/")] == ["bytes=1000-"]
    assert torch.equal(sae.W_dec, load_sae(FIXTURES / "gemmascope2_resid" / RESID).W_dec)


def test_connection_that_never_brings_a_byte_is_given_up(released: HubServer, waits: list[float]) -> None:
    released.cut("/storage/", after=0, times=100)
    with pytest.raises(
        FormatError, match=rf"{WEIGHTS} cannot be downloaded: .+, needs a connection; what came is kept"
    ):
        load_sae(f"{REPO}:{RESID}")
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_wrong_bytes_are_not_kept(released: HubServer, hub: HubServer) -> None:
    load_sae(f"{REPO}:{TRANSCODER}")
    oid = next(line.split("/")[-1].split("?")[0] for line in hub.asked("^GET /storage/"))
    content = hub.blobs[oid]
    shutil.rmtree(_cache() / "hub")
    hub.blobs[oid] = content[:-1] + bytes([content[-1] ^ 1])
    _freeze(hub, oid)
    with pytest.raises(FormatError, match=rf"came with hash [0-9a-f]{{64}}, needs {oid}; try again"):
        load_sae(f"{REPO}:{TRANSCODER}")
    assert not list((_cache() / "hub").rglob("*.incomplete"))


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent


def _freeze(hub: HubServer, oid: str) -> None:
    """Makes the server keep a blob as it is, whatever the repository holds."""
    kept = hub.blobs[oid]

    class Frozen(dict[str, bytes]):
        def __setitem__(self, key: str, value: bytes) -> None:
            super().__setitem__(key, kept if key == oid else value)

    hub.blobs = Frozen(hub.blobs)


@pytest.mark.parametrize("status", [429, 503])
def test_server_is_asked_again_after_the_time_it_names(released: HubServer, waits: list[float], status: int) -> None:
    for pattern in ("/tree/", "/resolve/", r"^GET /api/models/[^/]+/[^/]+\?"):
        released.fail(pattern, status, Retry_After="7")
    assert load_sae(f"{REPO}:{RESID}").d_sae > 0
    # The client itself waits for the listing, and a second longer.
    assert waits == [7.0, 8.0, 7.0]


def test_server_that_goes_on_failing_is_one_line(released: HubServer, waits: list[float]) -> None:
    released.fail("/api/models/", 500, times=100)
    with pytest.raises(FormatError, match=r"not in the hub's cache, and the hub cannot be asked \(.*500.*\)"):
        load_sae(f"{REPO}:{RESID}")
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_gated_repository_says_how_to_get_in(released: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    released.repos[REPO].is_gated = True
    with pytest.raises(
        FormatError, match=rf"gated, .*https://huggingface.co/{REPO}, then 'hf auth login' or set HF_TOKEN"
    ):
        load_sae(f"{REPO}:{RESID}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_sae(f"{REPO}:{RESID}").d_sae > 0


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize(
    ("ref", "revision", "message"),
    [
        ("runs/none", None, r"no such folder here, and no such repository on the hub that you may read"),
        ("google/gemma-scope-2-1b-p", None, r"did you mean 'google/gemma-scope-2-1b-pt'"),
        (REPO, "v9", rf"sae '{REPO}@v9': no such revision, needs one of main, or a commit"),
        (f"{REPO}:resid_post/layer_13_width_16k_l0_medum", None, rf"has no '.+', needs one of '{RESID}'"),
        (f"{REPO}:nowhere", None, rf"has no 'nowhere', needs one of '{RESID}', "),
        ("gemma-scope-2-1b-ptt/resid_post/x", None, r"did you mean .*'gemma-scope-2-1b-pt'"),
    ],
)
def test_wrong_reference_names_what_is_near(ref: str, revision: str | None, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(ref, revision=revision)
    assert "\n" not in str(caught.value)


def test_private_repository_is_like_none_without_a_login(released: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    released.repos[REPO].is_private = True
    with pytest.raises(FormatError, match=r"log in with 'hf auth login' if it is private"):
        load_sae(f"{REPO}:{RESID}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_sae(f"{REPO}:{RESID}").d_sae > 0


def test_registry_name_is_the_place_it_stands_for(released: HubServer) -> None:
    sae = load_sae(f"gemma-scope-2-1b-pt/{RESID}")
    assert sae.source["ref"] == f"{REPO}:{RESID}"
    assert sae.hook_point == "model.layers.13"


def test_each_revision_is_kept_apart(released: HubServer) -> None:
    repo = released.repos[REPO]
    first = repo.refs["main"]
    repo.tags["v1"] = first
    tensors = {name: tensor * 2 for name, tensor in safetensors.torch.load(repo.commits[first][WEIGHTS]).items()}
    second = repo.commit({WEIGHTS: safetensors.torch.save(tensors)})
    new = load_sae(f"{REPO}:{RESID}")
    old = load_sae(f"{REPO}:{RESID}", revision="v1")
    assert (new.source["revision"], old.source["revision"]) == (second, first)
    assert not torch.equal(new.W_dec, old.W_dec)
    released.requests.clear()
    assert torch.equal(load_sae(f"{REPO}:{RESID}", revision=first).W_dec, old.W_dec)
    assert released.requests == [], "a commit that is here is not asked for again"


def test_cache_answers_offline(released: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    first = load_sae(f"{REPO}:{RESID}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    released.requests.clear()
    assert torch.equal(load_sae(f"{REPO}:{RESID}").W_dec, first.W_dec)
    with pytest.raises(FormatError, match=r"sae 'google/other': .*not in the hub's cache.*\(offline mode\)"):
        load_sae("google/other:x")
    assert released.requests == []


def test_cache_answers_when_the_hub_cannot_be_reached(released: HubServer, waits: list[float]) -> None:
    first = load_sae(f"{REPO}:{RESID}")
    released.close()
    assert torch.equal(load_sae(f"{REPO}:{RESID}").W_dec, first.W_dec)


def test_half_a_dictionary_in_the_cache_is_not_taken_for_a_whole_one(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = FIXTURES / "circuittracer_clt_relu"
    hub.add("mntss/clt", folder)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    hub.fail(f"/resolve/.*/{names[-1]}", 403)
    with pytest.raises(FormatError, match="403"):
        load_sae("mntss/clt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match=rf"{names[-1]} is not in the hub's cache, .*'saekit pull' with one"):
        load_sae("mntss/clt")


@pytest.mark.parametrize("path", ["../outside.safetensors", "a/../../b.safetensors"])
def test_listing_that_leads_out_of_the_cache_is_refused(hub: HubServer, path: str) -> None:
    hub.add("evil/repo", {path: b"x"})
    with pytest.raises(FormatError, match=r"the hub lists '.+', needs a path and a hash"):
        load_sae("evil/repo")


def test_cache_that_cannot_be_written_says_so(
    released: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(ResourceError, match="cannot be written"):
        load_sae(f"{REPO}:{RESID}")


def test_disk_that_is_too_small_is_known_before_the_download(
    released: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ResourceError, match=r"0.00 GB free, needs 0.00 GB; make room, or set HF_HUB_CACHE"):
        load_sae(f"{REPO}:{RESID}")
    assert contents(released) == []


def test_broken_record_of_a_listing_is_made_anew(released: HubServer) -> None:
    load_sae(f"{REPO}:{RESID}")
    (record,) = (_cache() / "assets").rglob("*.json")
    for content in ("{", json.dumps({"folders": 3}), json.dumps({"folders": [""], "files": {"a": 1}})):
        record.write_text(content, encoding="utf-8")
        assert load_sae(f"{REPO}:{RESID}").d_sae > 0
    held: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    assert WEIGHTS in held["files"]
