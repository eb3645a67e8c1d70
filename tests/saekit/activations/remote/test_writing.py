"""Caches written to an object store: the bytes of a local one, whatever fails on the way, whoever is killed, and however many write."""

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, cache_activations, plan_cache, verify_store
from saekit.activations.location import RemoteConfig, attach
from saekit.activations.objects import Objects
from saekit.activations.writers import Writers
from saekit.errors import ConfigError, ResourceError, StoreError
from saekit.manifest import manifest_sha256
from saekit.models import LanguageModel, load_model
from tests.saekit.activations.remote.servers import Proxy, contents, no_fault, upload

WRITE = Objects.write


def test_cache_written_elsewhere_is_the_local_one(
    url: str,
    way: Proxy,
    config: CacheConfig,
    lm: LanguageModel,
    small: Path,
    tree: dict[str, bytes],
    tmp_path: Path,
    recorder: Any,
) -> None:
    # Each first attempt to write fails, and the answer to each first attempt to read breaks off.
    way.fault = lambda method, path, before: {"PUT": "503", "GET": "drop"}.get(method) if before == 0 else None
    store = cache_activations(config, url, lm=lm, progress=recorder)
    assert f"to upload to {url}; up to" in recorder.said[0]
    assert store.sha256 == manifest_sha256(small)
    # What stays on this machine: no activations.
    assert not list((tmp_path / "home").rglob("shard-*.zarr"))
    way.fault = no_fault
    assert contents(url) == tree
    way.asked.clear()
    cache_activations(config, url, lm=lm)
    assert {method for method, _, _ in way.asked} == {"GET"}


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_files_are_written_listed_read_and_removed(scheme: str, url: str, way: Proxy) -> None:
    there = Objects(url.replace("s3", scheme, 1))
    way.fault = lambda method, path, before: {0: "503", 1: "drop"}.get(before) if method == "GET" else None
    there.write("hooks/a@input/b.json", b"0123456789")
    there.write("hooks/a@input/b.json", b"0123456780")
    assert there.sizes() == {"hooks/a@input/b.json": 10}
    assert there.size("hooks/a@input/b.json") == 10
    assert there.read("hooks/a@input/b.json") == b"0123456780"
    assert bytes(there.read_range("hooks/a@input/b.json", 3, 6)) == b"345"
    with pytest.raises(StoreError, match="2 bytes at 8, needs 4"):
        there.read_range("hooks/a@input/b.json", 8, 12)
    there.remove("hooks/a@input/b.json")
    with pytest.raises(FileNotFoundError):
        there.read("hooks/a@input/b.json")
    with pytest.raises(StoreError, match="no bucket 'elsewhere' there"):
        Objects(f"{scheme}://elsewhere/a").write("b", b"1")


def test_long_files_are_sent_and_read_in_parts(url: str, way: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.activations.objects.SMALL_BYTES", 10 * 2**20)
    there, content = Objects(url), bytes(range(256)) * 45_000
    there.write("long", content)
    assert [method for method, _, _ in way.asked] == ["POST", *["PUT"] * 3, "POST"]
    assert b"".join(there.read_parts("long", len(content))) == content


def test_plan_says_what_is_sent_and_what_is_needed_here(
    config: CacheConfig, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_cache(config, tmp_path, lm=lm, upload_to="s3://bucket/a")
    assert plan.scratch_bytes < plan.size_bytes
    monkeypatch.setattr("saekit.activations.plan.free_bytes", lambda path: plan.scratch_bytes)
    assert plan_cache(config, tmp_path, lm=lm, upload_to="s3://bucket/a").upload_to == "s3://bucket/a"
    with pytest.raises(ResourceError, match="free on that disk"):
        plan_cache(config, tmp_path, lm=lm)


@pytest.mark.parametrize("instant", [9, 27, 44])
def test_a_run_that_is_killed_goes_on_at_its_missing_shards(
    instant: int,
    url: str,
    config: CacheConfig,
    lm: LanguageModel,
    tree: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, done = threading.Lock(), itertools.count()

    def dead(self: Objects, key: str, content: Path | bytes) -> None:
        with lock:
            if next(done) >= instant:
                raise KeyboardInterrupt
            WRITE(self, key, content)

    monkeypatch.setattr(Objects, "write", dead)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(config, url, lm=lm)
    declared = {key for key in Objects(url).sizes() if Path(key).match("hooks/*/shard-*.json")}
    if instant % 2:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    written: list[str] = []

    def note(self: Objects, key: str, content: Path | bytes) -> None:
        written.append(key)
        WRITE(self, key, content)

    monkeypatch.setattr(Objects, "write", note)
    cache_activations(config, url, lm=lm)
    assert not declared & set(written)
    assert contents(url) == tree


class Together(Writers):
    """One of two writers, which are threads here."""

    def gather(self, value: object) -> list[object]:  # type: ignore[override]  # of any type
        _values[self.rank] = value
        _barrier.wait(60)
        found = list(_values)
        _barrier.wait(60)
        return found


_values: list[object] = [None, None]
_barrier = threading.Barrier(2)


def test_several_writers_on_their_own_machines_write_the_same_cache(
    url: str,
    config: CacheConfig,
    tree: dict[str, bytes],
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me, failed = threading.local(), []
    monkeypatch.setattr("saekit.activations.collect.join_writers", lambda: Together(rank=me.rank, world_size=2))

    def run(rank: int) -> None:
        me.rank = rank
        try:
            folder = attach(tmp_path / f"machine-{rank}", RemoteConfig(url=url))
            cache_activations(config, folder, lm=load_model(str(tiny_model_dir("llama"))))
        except BaseException as error:
            failed.append(error)
            _barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert contents(url) == tree


def test_another_config_is_refused(uploaded: str, url: str, config: CacheConfig, lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="written with another config: dtype"):
        cache_activations(config.model_copy(update={"dtype": "float16"}), uploaded, lm=lm)


def test_folder_of_another_cache_is_not_attached(uploaded: str, url: str, small: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(small, tmp_path / "copied"))
    with pytest.raises(ConfigError, match="holds a cache of its own"):
        attach(copied, RemoteConfig(url=url))
    attach(copied, RemoteConfig(url=f"{uploaded}/"))
    shutil.rmtree(copied / "hooks" / "model.layers.1" / "shard-00000.zarr")
    store = ActivationStore.open(copied, "model.layers.1")
    assert store.sha256 == manifest_sha256(small)
    assert torch.equal(store.read_rows([0]), ActivationStore.open(small, "model.layers.1").read_rows([0]))


LAYER, OTHER = "hooks/model.layers.1", "hooks/model.layers.0@input"


def flip_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def test_damage_is_named_and_repaired(
    url: str, config: CacheConfig, lm: LanguageModel, small: Path, tree: dict[str, bytes]
) -> None:
    upload(small, url)
    there = Objects(url)
    first, second = (f"{LAYER}/shard-0000{n}.zarr/activations/c/0/0/0" for n in range(2))
    there.write(first, flip_bit(tree[first]))
    there.write(second, tree[second][:-1])
    there.remove(f"{OTHER}/shard-00000.zarr/activations/c/0/0/0")
    there.write(f"{OTHER}/shard-00001.json", tree[f"{LAYER}/shard-00001.json"])
    there.write(f"{OTHER}/shard-00009.zarr/activations/c/0/0/0", b"?")
    there.write(f"{OTHER}/statistics.json", flip_bit(tree[f"{OTHER}/statistics.json"]))
    there.remove("documents.jsonl")
    expected = [
        "token rows: documents.jsonl is missing",
        "model.layers.1: shard 0: shard-00000.zarr/activations/c/0/0/0 has changed since it was written (crc32c differs)",
        f"model.layers.1: shard 1: shard-00001.zarr/activations/c/0/0/0 has {len(tree[second]) - 1:,} bytes, needs"
        f" {len(tree[second]):,}",
        "model.layers.0:input: shard 0: shard-00000.zarr/activations/c/0/0/0 is missing",
        "model.layers.0:input: shard 1: belongs to another cache, hook point or place",
        "model.layers.0:input: shard-00009.zarr is foreign, no shard of this cache has that number",
        "model.layers.0:input: statistics: statistics.json has changed since it was written (crc32c differs)",
    ]
    assert verify_store(url, repair=True) == expected
    there.remove(f"{OTHER}/shard-00009.zarr/activations/c/0/0/0")
    cache_activations(config, url, lm=lm)
    assert verify_store(url) == []
    assert contents(url) == tree
