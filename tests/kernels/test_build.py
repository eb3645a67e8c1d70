"""The compiled kernels' library: built once, cached, repaired, shared between processes, and done without where it must be."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _build

KERNELS = Path(sk.__file__).parents[1]
PROGRAM = """
import torch, saekit_kernels as sk
code = sk.encode_topk(torch.eye(3), torch.arange(12.0).view(4, 3).T, torch.zeros(4), 2)
assert code.indices.tolist() == [[3, 2]] * 3, code
print(sk.resolve_backend("auto", torch.zeros(1)))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("SAEKIT_KERNELS", raising=False)
    return tmp_path / "saekit_kernels"


@pytest.fixture
def fresh(cache: Path) -> Iterator[Path]:
    """A process that has not tried to load anything yet, with an empty cache."""
    cached = (_build._library, _build._first_reason, _build._notify)
    for function in cached:
        function.cache_clear()
    yield cache
    for function in cached:
        function.cache_clear()


def start(**environment: str) -> subprocess.Popen[str]:
    """A new process that encodes something."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(KERNELS)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out.strip(), errors.strip()


def test_library_is_built_once_by_two_processes_at_a_time(compiled_backend: str, cache: Path) -> None:
    processes = [start(), start()]
    assert [output_of(process) for process in processes] == [("compiled", "")] * 2
    (library,) = cache.glob("*.so")
    assert [path.name for path in sorted(cache.iterdir())] == [
        f"{library.stem}.{ending}" for ending in ("lock", "sha256", "so")
    ]


def test_broken_library_is_built_again_and_a_whole_one_is_not(compiled_backend: str, fresh: Path) -> None:
    assert _build.why_unavailable() is None
    (library,) = fresh.glob("*.so")
    whole, built = library.read_bytes(), library.stat().st_mtime_ns
    _build._library.cache_clear()
    _build.library()
    assert library.stat().st_mtime_ns == built
    # Cut off in a new file: the old one is mapped into this process.
    library.unlink()
    library.write_bytes(whole[: len(whole) // 2])
    _build._library.cache_clear()
    _build.library()
    assert len(library.read_bytes()) == len(whole)
    library.with_suffix(".sha256").unlink()
    time.sleep(0.01)
    _build._library.cache_clear()
    _build.library()
    assert library.with_suffix(".sha256").read_text() == _build._digest(library)


def test_failed_build_falls_back_with_one_notice(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, "saekit_kernels"):
        for _ in range(3):
            assert sk.resolve_backend("auto", torch.zeros(1)) == "cpu"
    (record,) = caplog.records
    assert (
        "there is no C++ compiler 'no-such-compiler', needs g++ or clang++; going on with torch" in record.getMessage()
    )
    with pytest.raises(sk.BackendError, match=r"backend 'compiled': there is no C\+\+ compiler 'no-such-compiler'"):
        sk.resolve_backend("compiled", torch.zeros(1))
    assert not list(fresh.glob(".build-*"))


@pytest.mark.parametrize("forced", ["cpu", "reference"])
def test_other_backend_in_the_environment_builds_nothing(cache: Path, forced: str) -> None:
    assert output_of(start(SAEKIT_KERNELS=forced)) == (forced, "")
    assert not cache.exists()


def test_compiler_errors_are_told_in_one_line(
    compiled_backend: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int broken( {\n")
    monkeypatch.setattr(_build, "SOURCES", [source])
    reason = _build.why_unavailable()
    assert reason is not None
    assert "broken.cpp:1" in reason
    assert "error:" in reason
    assert "\n" not in reason


def test_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    reason = str(_build.why_unavailable())
    assert reason.startswith("cache of compiled kernels: ")
    assert f"{str(tmp_path / 'file' / 'saekit_kernels')!r}; set TORCH_EXTENSIONS_DIR to a folder" in reason


def test_no_home_is_no_crash(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(homeless))
    assert "Could not determine home directory" in str(_build.why_unavailable())


def test_library_that_was_built_elsewhere_is_used_from_a_folder_without_a_lock(
    compiled_backend: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build.library()
    (lock,) = fresh.glob("*.lock")
    lock.unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    _build._library.cache_clear()
    assert _build.why_unavailable() is None
    assert not lock.exists()


def test_name_depends_on_the_source_torch_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {_build.library_name(["-O3"]), _build.library_name(["-O2"])}
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9")
        names.add(_build.library_name(["-O3"]))
    other = tmp_path / _build.SOURCES[0].name
    other.write_text(_build.SOURCES[0].read_text() + "// changed\n")
    monkeypatch.setattr(_build, "SOURCES", [other, *_build.SOURCES[1:]])
    assert len(names | {_build.library_name(["-O3"])}) == 4


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_sources_compile_without_a_warning_for_every_kind_of_processor(
    compiled_backend: str, capability: str, tmp_path: Path
) -> None:
    flags = _build._VECTOR_FLAGS.get(capability, [])
    for source in _build.SOURCES:
        # GCC 12 takes the deliberately undefined argument inside _mm512_sqrt_ps for a mistake of the caller.
        strict = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
        command = [os.environ.get("CXX", "c++"), *_build._FLAGS, "-fPIC", *flags, *strict, "-c", str(source)]
        done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_library_uses_the_threads_of_torch_and_brings_none(compiled_backend: str) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf to look into the library with")
    path = Path(_build.library()._name)
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert "omp" not in needed
