"""Caches read where they lie: the same batches from the same positions, a damaged byte never, and one line where it cannot be."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, ShuffledBatches, cache_activations, verify_store
from saekit.activations.location import RemoteConfig, attach
from saekit.activations.objects import Objects
from saekit.errors import ConfigError, MissingDependencyError, ResourceError, SaekitError, StoreError
from saekit.models import LanguageModel
from tests.saekit.activations.remote.servers import SECRET, Proxy, files, no_fault, upload

HOOK_POINT = "model.layers.1"
SHARD = f"hooks/{HOOK_POINT}/shard-00001.zarr/activations/c/0/0/0"


def source(store: ActivationStore) -> ShuffledBatches:
    """Several windows an epoch."""
    return ShuffledBatches(store.view(), batch_size=64, seed=3, memory_bytes=30_000)


def test_batches_and_positions_are_those_of_the_local_store(uploaded: str, way: Proxy, small: Path) -> None:
    # Each first request is refused, or its answer breaks off.
    way.fault = lambda method, path, before: None if before else "503" if path.endswith(".json") else "drop"
    local = ActivationStore.open(small, HOOK_POINT)
    with (
        files(small) as http_url,
        source(local) as expected,
        source(ActivationStore.open(uploaded, HOOK_POINT)) as found,
    ):
        for _ in range(5):
            assert torch.equal(found.next_batch(), expected.next_batch())
        state = found.state_dict()
        assert state == expected.state_dict()
        with source(ActivationStore.open(http_url, HOOK_POINT)) as again:
            # The same run goes on with the cache at another place.
            again.load_state_dict(json.loads(json.dumps(state)))
            for _ in range(8):
                assert torch.equal(again.next_batch(), expected.next_batch())


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_rows_and_tokens_are_read_in_ranges(
    compression: str, config: CacheConfig, lm: LanguageModel, here: None, tmp_path: Path
) -> None:
    asked = config.model_copy(update={"compression": compression, "hook_points": (HOOK_POINT,)})
    local = cache_activations(asked, tmp_path / "cache", lm=lm)
    with files(tmp_path / "cache") as url:
        store = ActivationStore.open(url)
        rows = np.array([49, 3, 31, 32, 3])
        assert torch.equal(store.read_rows(rows), local.read_rows(rows))
        flat = np.array([799, 17, 18, 400, 0])
        assert torch.equal(store.read_tokens(flat), local.read_tokens(flat))
        assert np.array_equal(store.kinds(), local.kinds())
        assert np.array_equal(store.documents(), local.documents())
        assert store.documents_path.read_bytes() == local.documents_path.read_bytes()
        assert store.statistics.mean_norm == local.statistics.mean_norm


def test_neighbours_are_asked_for_together_and_small_files_once(uploaded: str, way: Proxy) -> None:
    ActivationStore.open(uploaded, HOOK_POINT)
    way.asked.clear()
    store = ActivationStore.open(uploaded, HOOK_POINT)
    assert [path.rpartition("/")[2] for _, path, _ in way.asked] == ["manifest.json", "bucket"]
    way.asked.clear()
    store.read_rows(np.arange(50))
    # Of each of two shards: its mark, its index, and all chunks.
    assert len(way.asked) == 6
    assert all(ranged is not None for _, _, ranged in way.asked)


def damaged(small: Path, to: Path, change: Callable[[bytes], bytes | None]) -> Path:
    shutil.copytree(small, to)
    data = change((to / SHARD).read_bytes())
    (to / SHARD).unlink()
    if data is not None:
        (to / SHARD).write_bytes(data)
    return to


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda data: data[:-1], "34,115 bytes, needs 34,116|bytes at"),
        (lambda data: data[:20], "bytes at"),
        (lambda data: data[:2000] + bytes([data[2000] ^ 4]) + data[2001:], r"chunk 0 has changed .*crc32c differs"),
        (lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "index has changed"),
        (lambda data: bytes([data[0] ^ 4]) + data[1:], "belongs to another cache"),
        (lambda data: None, "is missing"),
    ],
    ids=["end", "short", "flip", "index", "mark", "missing"],
)
def test_damage_elsewhere_never_becomes_a_number(
    change: Callable[[bytes], bytes | None], said: str, here: None, small: Path, tmp_path: Path
) -> None:
    with files(damaged(small, tmp_path / "cache", change)) as url:
        store = ActivationStore.open(url, HOOK_POINT)
        with pytest.raises(StoreError, match=said) as error:
            store.read_rows(np.arange(30, 50))
        assert f"{url}/{SHARD}" in str(error.value)
        problems = verify_store(url)
        assert len(problems) == 1
        assert "shard 1: shard-00001.zarr/activations/c/0/0/0" in problems[0]


def test_small_files_that_have_changed_are_not_taken(
    url: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(small, url)
    ActivationStore.open(url, HOOK_POINT)
    there, name = Objects(url), f"hooks/{HOOK_POINT}/statistics.json"
    there.write(name, there.read(name)[:-5] + b"7777\n")
    there.write("manifest.json", there.read("manifest.json") + b"\n")
    # Of another manifest all is looked at anew, and what is here is still right.
    ActivationStore.open(url, HOOK_POINT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(StoreError, match=r"statistics.json': has changed since it was written .*verify --repair"):
        ActivationStore.open(url, HOOK_POINT)
    there.remove(name)
    with pytest.raises(StoreError, match=r"statistics.json': is missing; run the cache command again"):
        ActivationStore.open(url, HOOK_POINT)


def test_a_cache_that_may_be_read_but_not_listed_is_read(uploaded: str, way: Proxy) -> None:
    way.fault = lambda method, path, before: "403" if path == "/bucket" else None
    assert ActivationStore.open(uploaded, HOOK_POINT).read_rows(np.array([1])).shape == (1, 16, 32)


def test_web_server_can_only_be_read(here: None, small: Path, config: CacheConfig, lm: LanguageModel) -> None:
    with files(small) as url:
        assert verify_store(url) == []
        for use in (lambda: cache_activations(config, url, lm=lm), lambda: verify_store(url, repair=True)):
            with pytest.raises(ResourceError, match="can only be read, needs an s3:// or gs:// URL"):
                use()


def test_web_server_without_range_is_refused(here: None, small: Path) -> None:
    with files(small, ranges=False) as url:
        store = ActivationStore.open(url, HOOK_POINT)
        with pytest.raises(StoreError, match="gives whole files only, needs one that answers requests with Range"):
            store.read_rows(np.array([0]))


def test_processes_that_open_a_cache_at_the_same_time_do_not_disturb_each_other(uploaded: str, url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: ActivationStore.open(uploaded, HOOK_POINT).kinds(), range(4)))
    assert all(np.array_equal(kinds, opened[0]) for kinds in opened)


def test_profiles_of_the_aws_tools_are_used(
    uploaded: str, way: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials").write_text(f"[work]\naws_access_key_id = mine\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    ActivationStore.open(uploaded, HOOK_POINT)
    assert all("Credential=mine/" in signature for signature in way.signatures)


def forbid(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    way.fault = lambda method, path, before: "403"


def forbid_writing(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    way.fault = lambda method, path, before: "403" if method == "PUT" else None


def stop(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")


def fail(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    way.fault = lambda method, path, before: "503"


def break_off(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    way.fault = lambda method, path, before: "drop"


def forget_credentials(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)


def name_profile(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "other")


def uninstall(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)


def do_nothing(monkeypatch: pytest.MonkeyPatch, way: Proxy) -> None:
    pass


ERRORS = [
    ("s3://bucket/nothing-there", do_nothing, StoreError, "cache 's3://bucket/nothing-there': no cache there"),
    ("s3://no-such-bucket/a", do_nothing, StoreError, "no bucket 'no-such-bucket' there, needs one that exists"),
    (
        "s3://bucket/a",
        forbid,
        ResourceError,
        r"a/manifest.json': cannot be read: access denied \(403\), needs credentials",
    ),
    ("s3://bucket/a", forget_credentials, ResourceError, "no credentials found, needs AWS_ACCESS_KEY_ID"),
    ("s3://bucket/a", name_profile, ConfigError, "AWS_PROFILE is 'other', needs the name of a profile"),
    ("s3://bucket/a", stop, ResourceError, "cannot be read: the connection is refused; .*run the same command again"),
    ("s3://bucket/a", fail, ResourceError, "cannot be read: the server answers 503; .*run the same command again"),
    ("s3://bucket/a", break_off, ResourceError, "cannot be read: the answer breaks off each time"),
    ("s3://bucket/a", uninstall, MissingDependencyError, r"needs obstore; run: pip install 'saekit\[remote\]'"),
    (f"https://me:{SECRET}@host/a", do_nothing, ConfigError, "'https://host/a': given with a user, password or query"),
    (f"https://host/a?key={SECRET}", do_nothing, ConfigError, "'https://host/a': given with a user, password or query"),
    ("ftp://host/a", do_nothing, ConfigError, "'ftp://host/a': needs a URL that begins with s3://, gs://, http://"),
    ("s3://", do_nothing, ConfigError, "names no bucket"),
]


@pytest.mark.parametrize("address, cause, kind, said", ERRORS, ids=[f"{c.__name__}-{u[:12]}" for u, c, _, _ in ERRORS])
def test_what_cannot_be_read_is_told_in_one_line(
    address: str,
    cause: Callable[[pytest.MonkeyPatch, Proxy], None],
    kind: type[SaekitError],
    said: str,
    url: str,
    way: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cause is break_off:
        Objects("s3://bucket/a").write("manifest.json", b"{}" * 100)
    cause(monkeypatch, way)
    with pytest.raises(kind, match=said) as error:
        ActivationStore.open(address)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("cause, said", [(forbid_writing, r"manifest.json': cannot be written: access denied \(403\)")])
def test_what_cannot_be_written_is_told_in_one_line(
    cause: Callable[[pytest.MonkeyPatch, Proxy], None],
    said: str,
    url: str,
    way: Proxy,
    config: CacheConfig,
    lm: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    cause(monkeypatch, way)
    with pytest.raises(ResourceError, match=said) as error:
        cache_activations(config, url, lm=lm)
    assert "\n" not in str(error.value)
    recorded = [path.read_bytes() for path in tmp_path.rglob("*.json")]
    assert recorded
    assert not any(SECRET.encode() in content for content in recorded)
    way.fault = no_fault
    with pytest.raises(StoreError, match=re.escape(f"cache '{url}': no cache there")):
        ActivationStore.open(url)
    with pytest.raises(StoreError, match="cannot be read, needs url and endpoint"):
        (attach(tmp_path / "a", RemoteConfig(url=url)) / "remote.json").write_text("?")
        ActivationStore.open(tmp_path / "a")
