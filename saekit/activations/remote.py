"""A cache whose shards lie on an object store or a web server, and the folder on this machine that holds its small files.

Token rows, kinds, statistics and records are copied into the folder, so that all that reads a cache reads them there; the
activations, which are nearly all of it, are read where they lie, in ranges. A cache is written the other way round: a shard is
finished in the folder, then sent, then declared by its record, and only then removed here. What a cache is, is said by its
manifest and the checksums in it, never by where it lies.
"""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import google_crc32c
from pydantic import ValidationError

from saekit.activations.layout import (
    INDEX_NAME,
    TOKENS_RECORD_NAME,
    FileRecord,
    HookIndex,
    PartRecord,
    file_problems,
    hook_folder,
    hook_points_of,
    read_record,
    record_name,
)
from saekit.activations.objects import SMALL_BYTES, Objects
from saekit.activations.providers import AccessError
from saekit.errors import ResourceError, StoreError
from saekit.manifest import MANIFEST_NAME, Manifest, atomic_write, read_manifest

__all__ = ["Remote"]

_TURN_NAME = ".pull.lock"


class Remote:
    """The shards of a cache where they lie; safe to use from several threads.

    Attributes:
        url: of the cache.
        folder: of its small files on this machine.
        objects: its files there.
    """

    def __init__(self, url: str, folder: Path, *, endpoint: str | None = None) -> None:
        """Sends nothing yet; use `find_cache`.

        Args:
            endpoint: see `RemoteConfig`.

        Raises:
            ConfigError: a URL that is not served.
            MissingDependencyError: obstore is not installed.
            ResourceError: no credentials.
        """
        self.objects = Objects(url, endpoint=endpoint)
        self.url = self.objects.url
        self.folder = folder
        self._endpoint = endpoint
        # Key -> length, as last listed and written; None where files cannot be listed.
        self._sizes: dict[str, int] | None = None

    @property
    def is_listed(self) -> bool:
        """Whether lengths of files are known without a request for each."""
        return self._sizes is not None

    def key(self, path: Path) -> str:
        """Returns what a file of the folder is called there."""
        return path.relative_to(self.folder).as_posix()

    def size(self, path: Path) -> int:
        """Returns the length of a file there.

        Raises:
            FileNotFoundError: it is not there.
            ResourceError: no access or no answer.
        """
        if self._sizes is None:
            return self.objects.size(self.key(path))
        if self.key(path) not in self._sizes:
            raise FileNotFoundError(f"'{self.url}/{self.key(path)}': not found")
        return self._sizes[self.key(path)]

    def crc32c(self, path: Path) -> str:
        """Returns the checksum of a file there, which is read for it and not kept.

        Raises:
            FileNotFoundError: it is not there.
            ResourceError: no access or no answer.
        """
        crc = 0
        for part in self.objects.read_parts(self.key(path), self.size(path)):
            crc = google_crc32c.extend(crc, bytes(part))
        return f"{crc:08x}"

    def shards(self, folder: Path) -> list[str]:
        """Returns the names of the shards of a hook point's folder, also of those that no record declares."""
        start = len(folder.relative_to(self.folder).parts)
        keys = [PurePosixPath(path).parts[start:] for path in self._below(folder)]
        return sorted({parts[0] for parts in keys if len(parts) > 1 and PurePosixPath(parts[0]).match("shard-*.zarr")})

    def below(self, path: Path) -> list[Path]:
        """Returns all files below a folder; none where files cannot be listed."""
        return [self.folder / key for key in self._below(path)]

    def _below(self, path: Path) -> list[str]:
        return sorted(key for key in self._sizes or {} if key.startswith(f"{self.key(path)}/"))

    def remove(self, path: Path) -> None:
        """Removes a file there and here.

        Raises:
            ResourceError: no access or no answer, or a server that can only be read.
        """
        self.check_writable()
        self.objects.remove(self.key(path))
        if self._sizes is not None:
            self._sizes.pop(self.key(path), None)
        path.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Checks that the cache can be written.

        Raises:
            ResourceError: it lies on a web server.
        """
        if not self.objects.is_writable:
            raise ResourceError(
                f"{self.url!r}: can only be read, needs an s3:// or gs:// URL or a folder to be written to"
            )

    def pull(self) -> None:
        """Brings manifest, token rows, kinds and statistics of a cache here; little more than the manifest where they are here.

        Raises:
            StoreError: no cache there, or files that are missing or have changed.
            ResourceError: no access or no answer, or the disk is full.
        """
        with _one_after_another(self.folder):
            self._pull()

    def _pull(self) -> None:
        here = self.folder / MANIFEST_NAME
        try:
            content = self.objects.read(MANIFEST_NAME)
            manifest = Manifest.model_validate_json(content)
        except FileNotFoundError as error:
            here.unlink(missing_ok=True)
            raise StoreError(f"cache {self.url!r}: no cache there, needs the URL of a cache's folder") from error
        except ValidationError as error:
            raise StoreError(f"cache {self.url!r}: its {MANIFEST_NAME} is none that this version can read") from error
        is_same = here.is_file() and here.read_bytes() == content
        if not is_same:
            # Until all of the new one is here, there is none.
            here.unlink(missing_ok=True)
        if self.objects.is_writable:
            with contextlib.suppress(AccessError):
                self._sizes = self.objects.sizes()
        if manifest.status == "complete":
            for name, kind in self._parts(manifest):
                if not is_same or not (self.folder / name).is_file():
                    self._bring(name)
                if (record := read_record(self.folder / name, kind)) is not None:
                    self.fetch((self.folder / name).parent, record, verify=not is_same)
        if not is_same:
            with atomic_write(here) as file:
                file.write(content)

    def sync(self) -> None:
        """Makes the records here, and the token rows, those that are there: what is not declared there has to be made.

        Raises:
            ResourceError: no access or no answer, a server that can only be read, or the disk is full.
        """
        self.check_writable()
        self._bring_records()
        for path in (
            self.folder / MANIFEST_NAME,
            self.folder / TOKENS_RECORD_NAME,
            *self.folder.glob("hooks/*/*.json"),
        ):
            if self._sizes is not None and self.key(path) not in self._sizes:
                path.unlink(missing_ok=True)
        manifest = read_manifest(self.folder)
        for name, kind in self._parts(manifest) if manifest is not None else []:
            # What cannot be had is missing here, and made anew.
            with contextlib.suppress(StoreError):
                if (record := read_record(self.folder / name, kind)) is not None:
                    self.fetch((self.folder / name).parent, record, verify=True)

    @contextlib.contextmanager
    def records(self) -> Iterator["Remote"]:
        """Yields the cache with another folder, which holds nothing but the records that are there now.

        Raises:
            ResourceError: no access or no answer.
        """
        with tempfile.TemporaryDirectory(prefix="saekit-records-") as folder:
            copy = Remote(self.url, Path(folder), endpoint=self._endpoint)
            copy._bring_records()
            yield copy

    def _bring_records(self) -> None:
        if self.objects.is_writable:
            self._sizes = self.objects.sizes()
            self.objects.each(self._bring, [key for key in self._sizes if _is_record(key)])
            return
        self._bring(MANIFEST_NAME)
        if (manifest := read_manifest(self.folder)) is None:
            return
        for name, kind in self._parts(manifest):
            self._bring(name)
            with contextlib.suppress(StoreError):
                index = read_record(self.folder / name, kind)
                if isinstance(index, HookIndex):
                    at = PurePosixPath(name).parent
                    self.objects.each(self._bring, [str(at / record_name(s.span.index)) for s in index.shards])

    @staticmethod
    def _parts(manifest: Manifest) -> list[tuple[str, type[PartRecord]]]:
        """Returns the records of all that is not a shard."""
        folders = [hook_folder(Path(), hook_point) for hook_point in hook_points_of(manifest)]
        return [(TOKENS_RECORD_NAME, PartRecord), *(((at / INDEX_NAME).as_posix(), HookIndex) for at in folders)]

    def _bring(self, key: str) -> None:
        """Copies a small file here; removes it here where it is not there."""
        path = self.folder / key
        try:
            content = self.objects.read(key)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return
        with atomic_write(path) as file:
            file.write(content)

    def fetch(self, folder: Path, record: PartRecord, *, verify: bool = False, but: str | None = None) -> None:
        """Brings the files of a part here that are not.

        Args:
            folder: of the record.
            verify: also those whose checksum here differs, else those of another length.
            but: a file that is not wanted.

        Raises:
            StoreError: a file is missing there, or has changed.
            ResourceError: no access or no answer, or the disk is full.
        """
        wanted = [
            name
            for name, file in record.files.items()
            if name != but and file_problems(folder, PartRecord(cache=record.cache, files={name: file}), verify=verify)
        ]
        small = [name for name in wanted if record.files[name].size_bytes <= SMALL_BYTES]
        self.objects.each(lambda name: self._fetch(folder / name, record.files[name]), small)
        for name in wanted:
            # In parts, and therefore not inside of `each`.
            if name not in small:
                self._fetch(folder / name, record.files[name])

    def _fetch(self, path: Path, expected: FileRecord) -> None:
        key, crc = self.key(path), 0
        try:
            is_small = expected.size_bytes <= SMALL_BYTES
            parts = [self.objects.read(key)] if is_small else self.objects.read_parts(key, expected.size_bytes)
            with atomic_write(path) as file:
                for part in parts:
                    crc = google_crc32c.extend(crc, bytes(part))
                    file.write(part)
                if f"{crc:08x}" != expected.crc32c:
                    raise StoreError(
                        f"'{self.url}/{key}': has changed since it was written (crc32c differs); run 'saekit verify --repair' on the"
                        " cache, then the cache command again"
                    )
        except FileNotFoundError as error:
            raise StoreError(
                f"'{self.url}/{key}': is missing; run the cache command again to repair the cache"
            ) from error

    def push(self, path: Path) -> None:
        """Puts a file of the folder there.

        Raises:
            StoreError: the bucket does not exist.
            ResourceError: no access or no answer.
        """
        self.objects.write(self.key(path), path)
        if self._sizes is not None:
            self._sizes[self.key(path)] = path.stat().st_size

    def publish(self, folder: Path, name: str, record: PartRecord) -> None:
        """Puts the files of a part there, and then the record that declares them, which lies here already.

        Raises:
            StoreError: the bucket does not exist.
            ResourceError: no access or no answer.
        """
        self.objects.each(lambda file: self.push(folder / file), record.files)
        self.push(folder / name)

    def clear(self) -> None:
        """Removes what is left here of shards that are there."""
        for path in self.folder.glob("hooks/*/shard-*.zarr"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _one_after_another(folder: Path) -> Iterator[None]:
    """Waits for other processes of this machine that are in such a block for the same folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _TURN_NAME).open("w")
    except OSError as error:
        raise ResourceError(f"{str(folder)!r}: cannot be written: {error.strerror or error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_record(key: str) -> bool:
    parts = PurePosixPath(key).parts
    return key in {MANIFEST_NAME, TOKENS_RECORD_NAME} or (
        len(parts) == 3 and parts[0] == "hooks" and parts[2].endswith(".json")
    )
