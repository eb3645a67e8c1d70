"""Damage is found, named, and made good by running the same command again."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saekit.activations import ActivationStore, CacheConfig, cache_activations, verify_store
from saekit.errors import StoreError
from saekit.models import LanguageModel

MakeConfig = Callable[..., CacheConfig]
Tree = Callable[[Path], dict[str, bytes]]
HOOK_POINTS = ["model.layers.1", "model.layers.0:input"]
LAYER = "hooks/model.layers.1"
CHUNK = f"{LAYER}/shard-00001.zarr/activations/c/0/0/0"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit(key: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def swap_with_shard_2(path: Path) -> None:
    for suffix in (".zarr", ".json"):
        mine, other = path.with_suffix(suffix), path.with_name(f"shard-00002{suffix}")
        spare = path.with_name("spare")
        mine.rename(spare)
        other.rename(mine)
        spare.rename(other)


def copy_as_shard_9(path: Path) -> None:
    shutil.copytree(path, path.with_name("shard-00009.zarr"))


def add_file(path: Path) -> None:
    (path / "activations" / "c" / "7").write_bytes(b"?")


# Where, what is done to it, what is said, and whether opening alone must notice.
DAMAGE = [
    (CHUNK, flip_bit, "model.layers.1: shard 1: .*has changed since it was written", False),
    (CHUNK, truncate, "model.layers.1: shard 1: .*c/0/0/0 has 34,115 bytes, needs 34,116", True),
    (CHUNK, remove, "model.layers.1: shard 1: .*c/0/0/0 is missing", True),
    (f"{LAYER}/shard-00001.zarr", remove, "model.layers.1: shard 1: .* is missing", True),
    (f"{LAYER}/shard-00001.zarr/zarr.json", flip_bit, "shard 1: .*zarr.json has changed", False),
    (f"{LAYER}/shard-00001.json", remove, "shard 1: shard-00001.json is missing", False),
    (f"{LAYER}/shard-00001.json", edit("files", []), "shard 1: shard-00001.json cannot be read", False),
    (f"{LAYER}/shard-00001.json", edit("cache", "0" * 64), "shard 1: belongs to another cache", False),
    (f"{LAYER}/shard-00001.zarr", swap_with_shard_2, "shard 1: belongs to another cache, hook point or place", None),
    (f"{LAYER}/shard-00001.zarr", copy_as_shard_9, "shard-00009.zarr is foreign", False),
    (f"{LAYER}/shard-00001.zarr", add_file, "shard 1: .*c/7 is foreign", False),
    (f"{LAYER}/kinds.zarr/kind/zarr.json", remove, "statistics: .*is missing", True),
    (f"{LAYER}/statistics.json", flip_bit, "statistics: .*has changed", False),
    (f"{LAYER}/index.json", remove, "index.json is missing", True),
    (f"{LAYER}/index.json", edit("d_in", 31), "index.json has changed", None),
    ("tokens.zarr/token/zarr.json", remove, "token rows: .*is missing", True),
    ("documents.jsonl", flip_bit, "token rows: documents.jsonl has changed", False),
    ("tokens.json", edit("cache", "0" * 64), "tokens.json belongs to another cache", True),
]


def test_sound_cache_has_no_problem(cached: Path) -> None:
    assert verify_store(cached) == []
    assert ActivationStore.open(cached, "model.layers.1", verify=True).num_tokens == 1600


@pytest.mark.parametrize(
    "place, damage, message, opening_notices",
    DAMAGE,
    ids=[f"{damage.__name__}-{Path(place).name}" for place, damage, _, _ in DAMAGE],
)
def test_damage_is_named(
    place: str, damage: Callable[[Path], None], message: str, opening_notices: bool | None, copied: Path
) -> None:
    damage(copied / place)
    problems = verify_store(copied)
    assert any(re.search(message, problem) for problem in problems), problems
    if opening_notices:
        with pytest.raises(StoreError, match="run the cache command again"):
            ActivationStore.open(copied, "model.layers.1")
    elif opening_notices is False:
        ActivationStore.open(copied, "model.layers.1")


def test_bit_flip_is_noticed_when_opened_with_verify(copied: Path) -> None:
    flip_bit(copied / CHUNK)
    with pytest.raises(StoreError, match=r"c/0/0/0 has changed.*repair"):
        ActivationStore.open(copied, "model.layers.1", verify=True)


@pytest.mark.parametrize(
    "place", [CHUNK, f"{LAYER}/kinds.zarr/kind/zarr.json", f"{LAYER}/index.json", "documents.jsonl"]
)
def test_missing_files_are_made_anew_by_the_same_command(
    place: str, copied: Path, cached: Path, make_config: MakeConfig, lm: LanguageModel, tree_of: Tree, recorder: Any
) -> None:
    remove(copied / place)
    cache_activations(make_config(hook_points=HOOK_POINTS), copied, lm=lm, progress=recorder)
    assert tree_of(copied) == tree_of(cached)
    assert any("made anew" in line for line in recorder.said)


@pytest.mark.parametrize("place", [CHUNK, f"{LAYER}/statistics.json", "documents.jsonl", "tokens.zarr/token/zarr.json"])
def test_repair_lets_the_same_command_make_changed_parts_anew(
    place: str, copied: Path, cached: Path, make_config: MakeConfig, lm: LanguageModel, tree_of: Tree
) -> None:
    flip_bit(copied / place)
    assert len(verify_store(copied, repair=True)) == 1
    with pytest.raises(StoreError, match="not finished"):
        ActivationStore.open(copied, "model.layers.1")
    cache_activations(make_config(hook_points=HOOK_POINTS), copied, lm=lm)
    assert verify_store(copied) == []
    assert tree_of(copied) == tree_of(cached)


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no cache there"):
        verify_store(tmp_path)


def test_caches_of_earlier_versions_are_refused_in_one_line(
    copied: Path, make_config: MakeConfig, lm: LanguageModel
) -> None:
    edit("files", {"documents.jsonl": {"size_bytes": 3, "sha256": "0" * 64}})(copied / "tokens.json")
    for use in (
        lambda: verify_store(copied),
        lambda: ActivationStore.open(copied, "model.layers.1"),
        lambda: cache_activations(make_config(hook_points=HOOK_POINTS), copied, lm=lm),
    ):
        with pytest.raises(
            StoreError, match=r"made by an earlier version of saekit.*remove the folder or choose another"
        ):
            use()
