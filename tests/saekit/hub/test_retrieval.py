"""Pulling releases to this machine: only what is asked for, copies that load as on the hub."""

from pathlib import Path

import pytest
import torch

from saekit.errors import ConfigError, FormatError
from saekit.hub import dictionary_info, load_sae, load_saes, pull
from saekit.hub.place import ORIGIN_NAME
from saekit.manifest import file_sha256
from saekit.progress import Progress
from tests.saekit.hub.conftest import FIXTURES
from tests.saekit.hub.hub_server import HubServer

REPO = "google/gemma-scope-2b-pt-res"
SAE = "layer_20/width_16k/average_l0_71"
WEIGHTS = FIXTURES / "gemmascope_res" / SAE / "params.npz"


@pytest.fixture
def scope(hub: HubServer) -> HubServer:
    """The hub with three dictionaries of two layers."""
    content = WEIGHTS.read_bytes()
    names = (SAE, "layer_20/width_16k/average_l0_139", "layer_12/width_16k/average_l0_82")
    hub.add(REPO, {f"{name}/params.npz": content for name in names} | {"README.md": b"big", "extra.bin": b"x" * 999})
    return hub


class Told:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.tasks: list[list[object]] = []

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> "Told":
        self.tasks.append([name, total, unit, done])
        return self

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, amount: int = 1, **_: float | str) -> None:
        done = self.tasks[-1][3]
        assert isinstance(done, int)
        self.tasks[-1][3] = done + amount

    def say(self, message: str) -> None: ...


def test_pull_brings_one_dictionary_and_says_how_far_it_is(scope: HubServer) -> None:
    told = Told()
    progress: Progress = told
    folder = pull("gemma-scope-2b-pt-res/" + SAE, progress=progress)
    assert (folder / "params.npz").read_bytes() == WEIGHTS.read_bytes()
    size = WEIGHTS.stat().st_size
    assert told.tasks == [[SAE, size, "bytes", size]]
    assert len(scope.asked("/resolve/")) == 1
    assert pull(f"{REPO}:{SAE}", progress=progress) == folder
    assert len(told.tasks) == len(scope.asked("/resolve/")) == 1


def test_progress_goes_on_where_a_cut_download_ended(scope: HubServer, waits: list[float]) -> None:
    scope.cut("/storage/", after=5000)
    scope.fail("/storage/", 403)
    with pytest.raises(FormatError, match="403"):
        pull(f"{REPO}:{SAE}", progress=Told())
    told = Told()
    pull(f"{REPO}:{SAE}", progress=told)
    assert told.tasks[0][3] == told.tasks[0][1] == WEIGHTS.stat().st_size
    assert waits == [1.0]


def test_server_without_ranges_sends_the_file_anew(scope: HubServer, waits: list[float]) -> None:
    scope.has_ranges = False
    scope.cut("/storage/", after=5000)
    told = Told()
    folder = pull(f"{REPO}:{SAE}", progress=told)
    assert (folder / "params.npz").read_bytes() == WEIGHTS.read_bytes()
    assert told.tasks[0][3] == told.tasks[0][1]
    assert waits == [1.0]


def test_pulled_copy_loads_as_from_the_hub(scope: HubServer, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    assert pull(f"{REPO}:{SAE}", to=target) == target
    assert sorted(path.name for path in target.iterdir()) == ["params.npz", ORIGIN_NAME]
    here, there = load_sae(target), load_sae(f"{REPO}:{SAE}")
    assert torch.equal(here.W_dec, there.W_dec)
    assert here.hook_point == there.hook_point == "model.layers.20"
    for key in ("ref", "repo", "revision", "files"):
        assert here.source[key] == there.source[key]
    assert load_sae(target / "params.npz").hook_point == "model.layers.20"
    assert dictionary_info(target).repo == REPO


def test_several_dictionaries_are_pulled_by_a_pattern(scope: HubServer, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds 3 SAE folders, needs one"):
        pull(REPO)
    assert scope.asked("/resolve/") == []
    folder = pull(REPO, pattern="layer_20/*", to=tmp_path / "mine")
    saes = load_saes(folder)
    assert sorted(saes) == ["layer_20/width_16k/average_l0_139", SAE]
    assert {sae.hook_point for sae in saes.values()} == {"model.layers.20"}
    assert len(scope.asked("/resolve/")) == 1, "both have the same content, which is downloaded once"
    with pytest.raises(FormatError, match=r"none is named like 'layer_3/\*', needs one of"):
        pull(REPO, pattern="layer_3/*")


def test_file_is_pulled_with_its_config(hub: HubServer, tmp_path: Path) -> None:
    repo = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    hub.add(repo, FIXTURES / "qwen_scope")
    file = pull(f"{repo}:layer0.sae.pt", to=tmp_path / "mine")
    assert file == tmp_path / "mine" / "layer0.sae.pt"
    assert (tmp_path / "mine" / "config.json").is_file()
    assert load_sae(tmp_path / "mine").hook_point == load_sae(f"{repo}:layer0.sae.pt").hook_point == "model.layers.0"


@pytest.mark.usefixtures("scope")
def test_sha256_is_enforced(tmp_path: Path) -> None:
    digest = file_sha256(WEIGHTS)
    pull(f"{REPO}:{SAE}", sha256=digest, to=tmp_path / "right")
    with pytest.raises(FormatError, match="it is not the file you mean"):
        pull(f"{REPO}:{SAE}", sha256="0" * 64, to=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ConfigError, match="a sha256 for 2 dictionaries, needs one"):
        pull(REPO, pattern="layer_20/*", sha256=digest)


@pytest.mark.usefixtures("scope")
def test_other_files_in_the_way_are_left_alone(tmp_path: Path) -> None:
    pull(f"{REPO}:{SAE}", to=tmp_path)
    pull(f"{REPO}:{SAE}", to=tmp_path)
    (tmp_path / "params.npz").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"params.npz' is another file, needs a folder without it"):
        pull(f"{REPO}:{SAE}", to=tmp_path)
    assert (tmp_path / "params.npz").read_bytes() == b"mine"


def test_local_folder_needs_no_pull() -> None:
    with pytest.raises(ConfigError, match="is here already, needs a place on the hub"):
        pull(str(FIXTURES / "gemmascope_res"))


def test_broken_record_of_the_origin_says_so(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(WEIGHTS.read_bytes())
    (tmp_path / ORIGIN_NAME).write_text('{"ref": 3}')
    with pytest.raises(FormatError, match="names no place on the hub, needs what 'saekit pull' wrote"):
        load_sae(tmp_path)
