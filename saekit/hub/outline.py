"""A release without its weights: the headers of its files, on disk or by ranges from the hub, in the place of the files."""

import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.array_headers import npz_headers, safetensors_headers
from saekit.hub.download import HubRef, Listing
from saekit.hub.headers import Container, TensorHeader
from saekit.hub.patience import first_line, patiently, refusal
from saekit.hub.pickle_outline import state_outline
from saekit.hub.pickles import state_container
from saekit.hub.place import Place
from saekit.hub.transfer import open_stream, pointer_path

__all__ = ["file_sizes", "open_outline"]

_BUFFER_BYTES = 16_384


class RangedFile(io.RawIOBase):
    """A file on the hub that is read where it is asked for, without a copy on disk.

    Raises:
        FormatError: the hub refuses, or cannot be reached.
    """

    def __init__(self, repo: str, commit: str, name: str, size: int) -> None:
        """Opens nothing yet.

        Args:
            size: bytes, as the hub lists them.
        """
        super().__init__()
        self._repo, self._commit, self._name, self._size = repo, commit, name, size
        self._at = 0

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether it can seek: yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a byte and returns it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError("a place before the start of the file")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        """Returns the present byte."""
        return self._at

    def readinto(self, buffer: object) -> int:
        """Fills a buffer from here on; one request."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # io gives any writable buffer
        wanted = min(len(view), self._size - self._at)
        if wanted <= 0:
            return 0
        try:
            content = patiently(lambda: self._ask(self._at, wanted))
        except Exception as error:
            raise refusal(error, self._repo, self._commit) or FormatError(
                f"sae {self._repo!r}: {self._name} cannot be read: {first_line(error)}, needs a connection; try again"
            ) from error
        view[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _ask(self, first: int, wanted: int) -> bytes:
        held = bytearray()
        with open_stream(self._repo, self._commit, self._name, first, first + wanted - 1) as response:
            skipped = 0 if response.status_code == 206 else first
            for chunk in response.iter_bytes():
                held += chunk
                # A server without ranges sends the whole file.
                if len(held) >= skipped + wanted:
                    break
        return bytes(held[skipped : skipped + wanted])


class _Outline:
    """A file's header in the place of a file; its tensors have shapes and no numbers, but for those of a few."""

    def __init__(self, headers: Mapping[str, TensorHeader]) -> None:
        self.headers = headers
        self.values: Mapping[str, object] = {}

    def tensor(self, name: str) -> Tensor:
        return self.headers[name].outline


def open_outline(place: Place, path: Path) -> Container:
    """Returns the header of one weights file of a place.

    Args:
        path: of the file on disk, or where it would be.

    Raises:
        FormatError: the file is broken or cannot be had.
    """
    name = (place.folder / path.relative_to(_root(place))).as_posix() if place.hub else str(path)
    where = f"'{place.repo}:{name}'" if place.hub else repr(name)
    size = path.stat().st_size if path.is_file() else _listed(place, name)
    with _opened(place, path, name, size) as file:
        match path.suffix:
            case ".safetensors":
                return _Outline(safetensors_headers(file, size, where, with_small=True))
            case ".npz":
                return _Outline(npz_headers(file, where, with_small=True))
            case ".pt" | ".pth":
                return state_container(path, state_outline(file, where), is_outline=True)
            case _:
                raise FormatError(f"{where}: a {path.suffix} file, needs .safetensors, .npz, .pt or .pth")


def file_sizes(place: Place, names: list[str], folder: Path) -> dict[str, tuple[int, str | None]]:
    """Returns bytes and sha256 of files of a place; the latter where the hub says it."""
    if place.hub is None:
        return {name: ((folder / name).stat().st_size, None) for name in names}
    listing: Listing = place.hub[1]
    found = {}
    for name in names:
        file = listing.files.get((place.folder / name).as_posix())
        found[name] = ((folder / name).stat().st_size, None) if file is None else (file.size, file.sha256)
    return found


def _root(place: Place) -> Path:
    assert place.hub is not None
    ref, listing = place.hub
    return pointer_path(ref.repo, listing.revision or "main", "") / place.folder


def _listed(place: Place, name: str) -> int:
    if place.hub is None or name not in place.hub[1].files:
        raise FormatError(f"{name!r}: no such file, needs the weights of a dictionary")
    return place.hub[1].files[name].size


def _opened(place: Place, path: Path, name: str, size: int) -> IO[bytes]:
    if path.is_file():
        return path.open("rb")
    assert place.hub is not None
    ref: HubRef
    listing: Listing
    ref, listing = place.hub
    if listing.snapshot is not None:
        raise FormatError(
            f"sae {ref.repo!r}: {PurePosixPath(name)} is not in the hub's cache, and the hub cannot be asked, needs a connection"
        )
    raw = RangedFile(ref.repo, listing.revision or "main", name, size)
    return io.BufferedReader(raw, _BUFFER_BYTES)
