"""A small cache of a tiny model, made once, and what is needed to make others."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from saekit.activations import ActivationStore, CacheConfig, cache_activations
from saekit.models import LanguageModel, load_model

WORDS = [
    "river",
    "town",
    "mill",
    "moon",
    "violin",
    "guitar",
    "harp",
    "rain",
    "proof",
    "envelope",
    "circle",
    "teacher",
    "stone",
    "lamp",
    "garden",
    "winter",
]


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tasks: list[tuple[str, int, int]] = []
        self.advanced: dict[str, int] = {}

    def say(self, message: str) -> None:
        self.said.append(message)

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator["RecordedTask"]:
        self.tasks.append((name, total, done))
        yield RecordedTask(self, name)


class RecordedTask:
    """A task that adds up."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self._recorder.advanced[self._name] = self._recorder.advanced.get(self._name, 0) + amount


@pytest.fixture
def recorder() -> Recorder:
    """A progress that keeps what it is told."""
    return Recorder()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 different documents of 3 to 50 words, one of them empty and one there twice."""
    path = tmp_path_factory.mktemp("cache-texts") / "texts.jsonl"
    lines = []
    for number in range(48):
        words = [WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(3 + number)]
        lines.append({"text": f"{number}: {' '.join(words)}.", "title": f"T{number}"})
    lines[5] = {"text": "", "title": "empty"}
    lines[40] = lines[30]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def lm(tiny_model_dir: Callable[[str], Path]) -> LanguageModel:
    """The tiny Llama."""
    return load_model(str(tiny_model_dir("llama")))


MakeConfig = Callable[..., CacheConfig]


@pytest.fixture(scope="session")
def make_config(tiny_model_dir: Callable[[str], Path], texts: Path) -> MakeConfig:
    """A function: changed fields -> config of a cache of 100 rows of 16 tokens in shards of 32 rows."""

    def make(**changes: object) -> CacheConfig:
        values: dict[str, object] = {
            "model": {"name": str(tiny_model_dir("llama"))},
            "text": {"kind": "files", "paths": [str(texts)]},
            "tokens": {"context_len": 16},
            "hook_points": ["model.layers.1"],
            "num_tokens": 1600,
            "batch_size": 8,
            "shard_tokens": 512,
        }
        return CacheConfig.parse(values | changes)

    return make


@pytest.fixture(scope="session")
def cached(make_config: MakeConfig, lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of two hook points; not to be changed."""
    out = tmp_path_factory.mktemp("cached") / "cache"
    cache_activations(make_config(hook_points=["model.layers.1", "model.layers.0:input"]), out, lm=lm)
    return out


@pytest.fixture
def copied(cached: Path, tmp_path: Path) -> Path:
    """A copy of the finished cache that may be changed."""
    return Path(shutil.copytree(cached, tmp_path / "copied"))


@pytest.fixture(scope="session")
def store(cached: Path) -> ActivationStore:
    """The finished cache, opened."""
    return ActivationStore.open(cached, "model.layers.1")


def tree(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file but the manifest, which holds times of day, and the lock."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("manifest.json", ".lock")
    }


@pytest.fixture
def tree_of() -> Callable[[Path], dict[str, bytes]]:
    """A function: folder -> bytes of its files."""
    return tree
