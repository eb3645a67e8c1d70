"""A run that is killed, or meets a full disk, goes on later and ends with the same bytes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from saekit.activations import ActivationStore, CacheConfig, cache_activations, verify_store
from saekit.errors import ResourceError, StoreError
from saekit.manifest import manifest_sha256, write_json
from saekit.models import LanguageModel, replace

MakeConfig = Callable[..., CacheConfig]
Tree = Callable[[Path], dict[str, bytes]]

CHILD = """
import contextlib, json, sys, time
import torch
from saekit.activations import CacheConfig, cache_activations

class Slow:
    def say(self, message): pass
    @contextlib.contextmanager
    def task(self, *args, **kwargs):
        yield self
    def advance(self, *args, **kwargs):
        time.sleep(0.2)

torch.set_num_threads(1)
config = CacheConfig.parse(json.load(open(sys.argv[1])))
cache_activations(config, sys.argv[2], progress=Slow())
"""


@pytest.fixture
def plain(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> Path:
    """A cache that was never interrupted."""
    return cache_activations(make_config(), tmp_path / "plain", lm=lm).path


def test_killed_process_resumes_to_the_same_bytes(
    plain: Path, make_config: MakeConfig, lm: LanguageModel, tmp_path: Path, tree_of: Tree
) -> None:
    out = tmp_path / "killed"
    write_json(tmp_path / "config.json", make_config().to_dict())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "config.json"), str(out)], env=environment)
    try:
        second = out / "hooks" / "model.layers.1" / "shard-00001.json"
        deadline = time.monotonic() + 120
        while not second.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.poll() is None, "the child ended before it could be killed"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert second.exists()
    assert not (out / "hooks" / "model.layers.1" / "index.json").exists()
    with pytest.raises(StoreError, match="not finished; run the cache command again"):
        ActivationStore.open(out)
    assert verify_store(out) == []
    cache_activations(make_config(), out, lm=lm)
    assert tree_of(out) == tree_of(plain)
    assert manifest_sha256(out) == manifest_sha256(plain)


def test_shards_in_place_are_not_computed_again(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cache"
    stop_at_flush(monkeypatch, 60)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(make_config(), out, lm=lm)
    monkeypatch.undo()
    written = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*.json")}
    assert 0 < len(written) < 4
    forwards = 0

    def count(hidden: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return hidden

    with replace(lm, "model.layers.0", count):
        cache_activations(make_config(), out, lm=lm)
    assert forwards == 13 - 4 * len(written)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def stop_at_flush(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Raises in the place of a power cut, at the given call of fsync."""
    flush, calls = os.fsync, 0

    def flush_or_stop(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise KeyboardInterrupt
        flush(handle)

    monkeypatch.setattr(os, "fsync", flush_or_stop)


@pytest.mark.parametrize("number", [2, 3, 10, 19, 25, 33, 60, 75, 80])
def test_stop_at_any_flush_resumes_to_the_same_bytes(
    number: int,
    plain: Path,
    make_config: MakeConfig,
    lm: LanguageModel,
    tmp_path: Path,
    tree_of: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "stopped"
    stop_at_flush(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(make_config(), out, lm=lm)
    monkeypatch.undo()
    cache_activations(make_config(), out, lm=lm)
    assert tree_of(out) == tree_of(plain)


def test_full_disk_stops_with_one_line_and_resumes(
    plain: Path,
    make_config: MakeConfig,
    lm: LanguageModel,
    tmp_path: Path,
    tree_of: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from saekit.activations import writer

    write, calls = writer.write_arrays, 0

    def fill(path: Path, *args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        write(path, *args, **kwargs)
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_arrays", fill)
    out = tmp_path / "full"
    with pytest.raises(
        ResourceError, match=r"shard-00001.*No space left on device.*run the same command again"
    ) as raised:
        cache_activations(make_config(), out, lm=lm)
    assert "\n" not in str(raised.value)
    assert not list(out.rglob(".*.tmp"))
    monkeypatch.undo()
    cache_activations(make_config(), out, lm=lm)
    assert tree_of(out) == tree_of(plain)


def test_disk_that_runs_low_is_told_before_the_next_shard(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "low"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("saekit.activations.collect.free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match=r"0\.00 GB free on that disk, the next shard needs"):
        cache_activations(make_config(), out, lm=lm)
    assert usage.free > 1000
