"""Artifact folders: written last and atomically, skipped, resumed or refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saekit.errors import ConfigError, ResourceError, StoreError
from saekit.manifest import (
    atomic_write,
    begin_stage,
    finish_stage,
    manifest_sha256,
    read_manifest,
    write_json,
)


def test_begin_stage_is_new_then_resume_then_complete(tmp_path: Path) -> None:
    assert begin_stage(tmp_path, "cache", {"a": 1}) == "new"
    assert begin_stage(tmp_path, "cache", {"a": 1}) == "resume"
    finish_stage(tmp_path, {"tokens": 5})
    assert begin_stage(tmp_path, "cache", {"a": 1}) == "complete"
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.counts == {"tokens": 5}
    assert manifest.versions["torch"]


@pytest.mark.parametrize(
    ("stage", "config", "inputs", "message"),
    [
        ("cache", {"a": 2, "b": {"c": 1}}, {"x": "1"}, r"a \(1 there, 2 asked\)"),
        ("cache", {"a": 1, "b": {"c": 9}}, {"x": "1"}, r"b.c \(1 there, 9 asked\)"),
        ("train", {"a": 1, "b": {"c": 1}}, {"x": "1"}, "holds the output of stage 'cache'"),
        ("cache", {"a": 1, "b": {"c": 1}}, {"x": "2"}, "its input x has changed"),
    ],
)
def test_begin_stage_refuses_and_names(
    tmp_path: Path, stage: str, config: dict[str, object], inputs: dict[str, str], message: str
) -> None:
    begin_stage(tmp_path, "cache", {"a": 1, "b": {"c": 1}}, {"x": "1"})
    with pytest.raises(ConfigError, match=message):
        begin_stage(tmp_path, stage, config, inputs)


def test_manifest_sha256_depends_on_content_not_on_time(tmp_path: Path) -> None:
    for name in ("one", "two", "other"):
        begin_stage(tmp_path / name, "cache", {"a": 1 if name != "other" else 2})
        finish_stage(tmp_path / name, {"tokens": 5})
    assert manifest_sha256(tmp_path / "one") == manifest_sha256(tmp_path / "two") != manifest_sha256(tmp_path / "other")


def test_manifest_sha256_needs_a_finished_stage(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no manifest.json"):
        manifest_sha256(tmp_path)
    begin_stage(tmp_path, "cache", {})
    with pytest.raises(StoreError, match="has not finished"):
        manifest_sha256(tmp_path)


def test_read_manifest_refuses_garbage(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"stage": 3')
    with pytest.raises(StoreError, match="not a manifest"):
        read_manifest(tmp_path)


def test_atomic_write_keeps_the_old_file_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_the_old_file_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    program = (
        "import os, signal, sys\nfrom saekit.manifest import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n    f.write(b'half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_atomic_write_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "value.json", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "value.json").stat().st_mode & 0o777 == 0o640


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_says_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_json(tmp_path / "value.json", 1)
    assert list(tmp_path.iterdir()) == []
