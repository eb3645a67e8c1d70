"""Caches on object stores and web servers: written, resumed, read, verified, repaired, and refused in one line."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, ShuffledBatches, cache_activations, objects, verify_store
from saekit.activations.objects import Objects
from saekit.activations.remote import RemoteConfig, attach
from saekit.activations.writers import Writers
from saekit.errors import ConfigError, MissingDependencyError, ResourceError, SaekitError, StoreError
from saekit.manifest import manifest_sha256
from saekit.models import LanguageModel, load_model
from tests.saekit.activations.remote.servers import Proxy, no_fault

MakeConfig = Callable[..., CacheConfig]
numbers = itertools.count()
HOOK_POINTS = ["model.layers.1", "model.layers.0:input"]
LAYER = "hooks/model.layers.1"
CHUNK = f"{LAYER}/shard-00001.zarr/activations/c/0/0/0"


def upload(folder: Path, url: str) -> None:
    there = Objects(url)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    there.each(lambda path: there.write(path.relative_to(folder).as_posix(), path.read_bytes()), paths)


def contents(url: str) -> dict[str, bytes]:
    """Returns the bytes of every file but the manifest, which holds times of day."""
    there = Objects(url)
    keys = [key for key in there.sizes() if key != "manifest.json"]
    return dict(zip(keys, there.each(there.read, keys), strict=True))


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"home-{next(numbers)}"))


def batches(store: ActivationStore, count: int = 4) -> list[torch.Tensor]:
    with ShuffledBatches(store.view(), batch_size=64, seed=3, memory_bytes=60_000) as source:
        return [source.next_batch().clone() for _ in range(count)]


@pytest.fixture(scope="session")
def tree(cached: Path) -> dict[str, bytes]:
    names = {path: path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for path, name in names.items() if name not in ("manifest.json", ".lock")}


def test_cache_written_to_s3_is_the_local_one(
    url: str, s3: Proxy, make_config: MakeConfig, lm: LanguageModel, cached: Path, tree: dict[str, bytes], tmp_path: Path
) -> None:
    # Every first attempt to write fails, and the answers to every first attempt to read break off.
    s3.fault = lambda method, path, before: {"PUT": "503", "GET": "drop"}.get(method) if before == 0 else None
    store = cache_activations(make_config(hook_points=HOOK_POINTS), url, lm=lm)
    assert contents(url) == tree
    assert verify_store(url) == []
    local = ActivationStore.open(cached, "model.layers.1")
    assert store.sha256 == local.sha256 == manifest_sha256(cached)
    rows = np.array([99, 3, 31, 32, 64])
    assert torch.equal(store.read_rows(rows), local.read_rows(rows))
    for found, expected in zip(batches(store), batches(local), strict=True):
        assert torch.equal(found, expected)
    assert not list((tmp_path / "home").rglob("c/0/0/0"))
    s3.fault = no_fault
    s3.asked.clear()
    cache_activations(make_config(hook_points=HOOK_POINTS), url, lm=lm)
    assert all(method != "PUT" for method, _, _ in s3.asked)


@pytest.mark.parametrize("instant", [1, 4, 9, 16, 30, 46, 52, 57])
def test_a_run_that_is_killed_goes_on_at_its_missing_shards(
    instant: int,
    url: str,
    make_config: MakeConfig,
    lm: LanguageModel,
    tree: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, lock, done = Objects.write, threading.Lock(), itertools.count()

    def dead(self: Objects, key: str, content: Path | bytes) -> None:
        with lock:
            if next(done) >= instant:
                raise KeyboardInterrupt
            write(self, key, content)

    monkeypatch.setattr(Objects, "write", dead)
    config = make_config(hook_points=HOOK_POINTS)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(config, url, lm=lm)
    monkeypatch.setattr(Objects, "write", write)
    before = {key for key in Objects(url).sizes() if key.endswith(".json") and "/shard-" in key and "zarr" not in key}
    if instant % 2:
        another_machine(tmp_path, monkeypatch)
    written: list[str] = []
    monkeypatch.setattr(Objects, "write", lambda self, key, content: (written.append(key), write(self, key, content))[1])
    cache_activations(config, url, lm=lm)
    assert not before & set(written)
    assert contents(url) == tree


class Together(Writers):
    """One of two writers that are threads."""

    def gather(self, value: object) -> list[object]:  # type: ignore[override]  # of any type
        values[self.rank] = value
        barrier.wait(60)
        found = list(values)
        barrier.wait(60)
        return found


values: list[object] = [None, None]
barrier = threading.Barrier(2)


def test_several_writers_on_their_own_machines_write_the_same_cache(
    url: str,
    make_config: MakeConfig,
    tiny_model_dir: Callable[[str], Path],
    tree: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me = threading.local()
    monkeypatch.setattr("saekit.activations.collect.join_writers", lambda: Together(rank=me.rank, world_size=2))
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        me.rank = rank
        try:
            folder = attach(tmp_path / f"machine-{rank}", RemoteConfig(url=url))
            cache_activations(make_config(hook_points=HOOK_POINTS), folder, lm=load_model(str(tiny_model_dir("llama"))))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert contents(url) == tree


def flip_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def truncate(data: bytes) -> bytes:
    return data[:-1]


def remove(data: bytes) -> None:
    return None


def copy(data: bytes) -> bytes:
    return data


# Where, what is done to it, where the outcome goes, and what is said.
DAMAGE = [
    (CHUNK, flip_bit, CHUNK, "model.layers.1: shard 1: .*has changed since it was written"),
    (CHUNK, truncate, CHUNK, "model.layers.1: shard 1: .*c/0/0/0 has 34,115 bytes, needs 34,116"),
    (CHUNK, remove, CHUNK, "model.layers.1: shard 1: .*c/0/0/0 is missing"),
    (f"{LAYER}/shard-00001.json", remove, f"{LAYER}/shard-00001.json", "shard 1: shard-00001.json is missing"),
    (f"{LAYER}/shard-00002.json", copy, f"{LAYER}/shard-00001.json", "shard 1: belongs to another cache"),
    (CHUNK, copy, CHUNK.replace("00001", "00009"), "shard-00009.zarr is foreign"),
    (f"{LAYER}/statistics.json", flip_bit, f"{LAYER}/statistics.json", "statistics: .*has changed"),
    ("documents.jsonl", remove, "documents.jsonl", "token rows: documents.jsonl is missing"),
]


def test_damage_is_named_and_repaired(
    url: str, make_config: MakeConfig, lm: LanguageModel, cached: Path, tree: dict[str, bytes]
) -> None:
    upload(cached, url)
    there = Objects(url)
    for place, damage, to, _ in DAMAGE:
        changed = damage(there.read(place))
        there.remove(to) if changed is None else there.write(to, changed)
        problems = verify_store(url)
        assert len(problems) == 1
        assert pytest.raises(AssertionError) is not None
        there.write(to, tree[to]) if to in tree else there.remove(to)
