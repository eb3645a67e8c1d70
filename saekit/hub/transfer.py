"""One file from the hub into its client's cache: resumed where it was cut, checked before it counts."""

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from saekit.errors import FormatError, ResourceError
from saekit.hub.patience import TRIES, first_line, wait_seconds
from saekit.progress import Progress, Task

__all__ = ["HubFile", "blob_path", "client_bars", "download_file", "open_stream", "partial_bytes", "pointer_path"]

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20


class HubFile(NamedTuple):
    """What a listing says of one file."""

    size: int
    """Bytes."""
    oid: str
    """sha256 of the content, or git's hash of it."""

    @property
    def sha256(self) -> str | None:
        """sha256, where the hub says it: for what it stores as a large file."""
        return self.oid if len(self.oid) == 64 else None


def _home(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def pointer_path(repo: str, commit: str, name: str) -> Path:
    """Returns where the cache shows a file of a commit."""
    return _home(repo) / "snapshots" / commit / name


def blob_path(repo: str, file: HubFile) -> Path:
    """Returns where the cache keeps a file's content."""
    return _home(repo) / "blobs" / file.oid


def partial_bytes(repo: str, file: HubFile) -> int:
    """Returns how much of a file an earlier, cut download left behind."""
    partial = _partial(repo, file)
    return partial.stat().st_size if partial.is_file() else 0


def download_file(repo: str, commit: str, name: str, file: HubFile, task: Task) -> Path:
    """Downloads a file into the cache of huggingface_hub, from where a killed download stopped; returns its path there.

    Over plain HTTP, which can be resumed at any byte, also where the hub offers its own chunked protocol.

    Args:
        task: is told of every byte.

    Raises:
        FormatError: what came is not what the hub's listing announced.
        ResourceError: the cache cannot be written.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # its names are exported at run time

    lock = _home(repo).parent / ".locks" / _home(repo).name / f"{file.oid}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        blob, partial = blob_path(repo, file), _partial(repo, file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.is_file():
                _receive(repo, commit, name, file, partial, task)
                partial.replace(blob)
            return _point(repo, commit, name, blob)
    except OSError as error:
        if isinstance(error, ResourceError) or _is_of_the_client(error):
            raise
        raise ResourceError(f"{str(_home(repo))!r}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def open_stream(repo: str, commit: str, name: str, first: int, last: int | None = None) -> Iterator[Any]:
    """Opens the hub's answer to a request for a file's bytes `first` to `last`: an httpx response that streams.

    Raises:
        HfHubHTTPError: the hub refuses.
    """
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # as above
        build_hf_headers,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if first or last is not None:
        headers["Range"] = f"bytes={first}-{'' if last is None else last}"
    # The hub's own address, not that of the storage behind it: a signed one ends before a long download does.
    url = hf_hub_url(repo, name, revision=commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
        hf_raise_for_status(response)
        yield response


def _partial(repo: str, file: HubFile) -> Path:
    return _home(repo) / "blobs" / f"{file.oid}.saekit.incomplete"


def _receive(repo: str, commit: str, name: str, file: HubFile, partial: Path, task: Task) -> None:
    fruitless = 0
    with partial.open("ab") as out:
        while out.tell() < file.size:
            start = out.tell()
            try:
                _append(repo, commit, name, file, out, task)
            except Exception as error:
                seconds = wait_seconds(error, fruitless)
                fruitless = 0 if out.tell() > start else fruitless + 1
                if seconds is None or fruitless == TRIES:
                    raise
                log.warning(
                    "%s: %s: cut at byte %d: %s; again in %.0f s", repo, name, out.tell(), first_line(error), seconds
                )
                time.sleep(seconds)
    found = _digest(partial, file)
    if found != file.oid:
        partial.unlink()
        raise FormatError(f"sae {repo!r}: {name} came with hash {found}, needs {file.oid}; try again")


def _append(repo: str, commit: str, name: str, file: HubFile, out: IO[bytes], task: Task) -> None:
    with open_stream(repo, commit, name, out.tell()) as response:
        if response.status_code == 200 and out.tell():
            # A server without ranges sends the whole file again.
            task.advance(-out.tell())
            out.seek(0)
            out.truncate()
        # As it comes: chunks of a size would lose what was received of the last one when the connection is cut.
        for chunk in response.iter_bytes():
            out.write(chunk)
            task.advance(len(chunk))
            if out.tell() > file.size:
                raise FormatError(
                    f"sae {repo!r}: {name} has more than the {file.size} bytes that the hub lists; try again"
                )


def _digest(path: Path, file: HubFile) -> str:
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _point(repo: str, commit: str, name: str, blob: Path) -> Path:
    pointer = pointer_path(repo, commit, name)
    if not pointer.is_file():
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            # A file system without links holds the content twice, as huggingface_hub does there.
            shutil.copyfile(blob, pointer)
    return pointer


def _is_of_the_client(error: OSError) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    return isinstance(error, HfHubHTTPError | OfflineModeIsEnabled)


class _BarTask:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self._bar.update(amount)


class _ClientBars:
    """The bars of huggingface_hub, which its own settings switch off."""

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Task]:
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # as above

        options = {"desc": name, "total": total, "initial": done, "unit": "B", "unit_scale": True}
        with tqdm(**options) as bar:  # type: ignore[no-untyped-call]  # the client has none
            yield _BarTask(bar)

    def say(self, message: str) -> None:
        log.info("%s", message)


def client_bars() -> Progress:
    """Returns progress as users of huggingface_hub know it."""
    return _ClientBars()
