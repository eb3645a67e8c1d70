"""Files on an object store or a web server, by key: read whole or in ranges, several at a time, and written; one line for each error.

obstore repeats requests that no answer comes to, or an answer of the 5xx kind, with growing pauses. What breaks off in the middle of
an answer, or ends early without a word, is asked for again here.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from saekit.activations.providers import AccessError, check_url, connect, needed_credentials
from saekit.errors import ResourceError, SaekitError, StoreError

__all__ = ["GO_ON", "SMALL_BYTES", "Objects"]

GO_ON = "what is finished stays: run the same command again to go on"

SMALL_BYTES = 16 * 2**20
"""Of one answer; longer files are read in parts."""

_MAX_PARTS = 9_000
_PARTS_AHEAD = 8
_IN_FLIGHT = 96
# Answers that break off, on top of what obstore repeats.
_ATTEMPTS = 5
_FIRST_PAUSE = 0.2

_Value = TypeVar("_Value")
_Work = TypeVar("_Work")


class Objects:
    """The files under one URL; safe to use from several threads.

    Attributes:
        url: of the folder.
        is_writable: whether files can be written and listed; not on a web server.
    """

    def __init__(self, url: str, *, endpoint: str | None = None) -> None:
        """Sends nothing yet.

        Args:
            url: `s3://bucket/folder`, `gs://bucket/folder` or `http(s)://host/folder`.
            endpoint: of the service, where it is not the provider's own; None = that of the environment.

        Raises:
            ConfigError: no such URL.
            MissingDependencyError: obstore is not installed.
        """
        self.url = check_url(url)
        self.is_writable = not url.startswith("http")
        self._store = connect(self.url, endpoint)
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="saekit-remote")

    def stream(self, function: Callable[[_Work], _Value], work: Iterable[_Work]) -> Iterator[_Value]:
        """Yields what `function` makes of each piece of work, in order, many at a time; it must not call this in turn."""
        return self._pool.map(function, work)

    def each(self, function: Callable[[_Work], _Value], work: Iterable[_Work]) -> list[_Value]:
        """Returns what `stream` yields."""
        return list(self.stream(function, work))

    def read(self, key: str) -> bytes:
        """Returns a small file.

        Raises:
            FileNotFoundError: it is not there.
            StoreError: the bucket does not exist.
            ResourceError: no access, or no answer after all attempts.
        """
        return self._repeated(key, "read", lambda: bytes(self._store.get(key).bytes()))

    def read_range(self, key: str, start: int, end: int) -> memoryview:
        """Returns the bytes from `start` to before `end`.

        Raises:
            FileNotFoundError: it is not there.
            StoreError: the file ends before, or the server does not give parts of files.
            ResourceError: no access, or no answer after all attempts.
        """

        def ask() -> memoryview:
            found = memoryview(self._store.get_range(key, start=start, end=end))
            if len(found) != end - start:
                raise _ShortError(len(found))
            return found

        try:
            return self._repeated(key, "read", ask)
        except _ShortError as error:
            raise StoreError(
                f"'{self.url}/{key}': {error.args[0]:,} bytes at {start:,}, needs {end - start:,}; run 'saekit verify' on the"
                " cache"
            ) from error

    def read_parts(self, key: str, size: int) -> Iterator[memoryview]:
        """Yields a large file of known length in parts, several of which are on their way."""
        starts = range(0, size, SMALL_BYTES)
        for first in range(0, len(starts), _PARTS_AHEAD):
            group = starts[first : first + _PARTS_AHEAD]
            yield from self.each(lambda start: self.read_range(key, start, min(start + SMALL_BYTES, size)), group)

    def size(self, key: str) -> int:
        """Returns the length of a file.

        Raises:
            FileNotFoundError: it is not there.
            ResourceError: no access, or no answer after all attempts.
        """
        return self._repeated(key, "read", lambda: int(self._store.head(key)["size"]))

    def sizes(self) -> dict[str, int]:
        """Returns key and length of every file.

        Raises:
            StoreError: the bucket does not exist.
            ResourceError: no access, or no answer after all attempts.
        """

        def ask() -> dict[str, int]:
            return {str(item["path"]): int(item["size"]) for part in self._store.list() for item in part}

        return self._repeated("", "listed", ask)

    def write(self, key: str, content: Path | bytes) -> None:
        """Puts a file in place at once, also where one was; a long one is sent in parts.

        Raises:
            StoreError: the bucket does not exist.
            ResourceError: no access, or no answer after all attempts.
        """
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        part = max(SMALL_BYTES // 2, -(-size // _MAX_PARTS))
        try:
            self._repeated(key, "written", lambda: self._store.put(key, content, chunk_size=part, max_concurrency=4))
        except FileNotFoundError as error:
            raise ResourceError(f"'{self.url}/{key}': cannot be written: not found (404)") from error

    def remove(self, key: str) -> None:
        """Removes a file.

        Raises:
            ResourceError: no access, or no answer after all attempts.
        """
        self._repeated(key, "removed", lambda: self._store.delete(key))

    def _repeated(self, key: str, what: str, function: Callable[[], _Value]) -> _Value:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return function()
            except SaekitError:
                raise
            except Exception as error:
                told = self._told(error, key, what)
                # obstore has repeated what was worth it, except where an answer broke off.
                if attempt == _ATTEMPTS or not _broke_off(error):
                    raise told from error
            time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _told(self, error: Exception, key: str, what: str) -> Exception:
        """Returns the error in one line, without anything that the server says in its own words."""
        where, text = f"'{self.url}/{key}'" if key else repr(self.url), str(error)
        found = re.search(r"non-2xx status code: (\d+)", text)
        status = int(found[1]) if found else None
        if isinstance(error, _ShortError):
            return error
        if status == 416:
            return _ShortError(0)
        if "NoSuchBucket" in text or "specified bucket does not exist" in text:
            return StoreError(f"{self.url!r}: no bucket {urlsplit(self.url).netloc!r} there, needs one that exists")
        if "169.254.169.254" in text or "metadata.google.internal" in text:
            return AccessError(f"{self.url!r}: no credentials found, needs {needed_credentials(self.url)}")
        if isinstance(error, FileNotFoundError) or status == 404:
            return FileNotFoundError(f"{where}: not found")
        if status in {401, 403}:
            return AccessError(
                f"{where}: cannot be {what}: access denied ({status}), needs credentials that may do so:"
                f" {needed_credentials(self.url)}"
            )
        if "RangeNotSupported" in text:
            return StoreError(f"{where}: the server gives whole files only, needs one that answers requests with Range")
        if status in {301, 307}:
            return ResourceError(f"{where}: the bucket is in another region, needs AWS_REGION set to it")
        if status is not None:
            return ResourceError(f"{where}: cannot be {what}: the server answers {status}; {GO_ON}")
        reason = next((line for mark, line in _REASONS.items() if mark in text), type(error).__name__)
        return ResourceError(f"{where}: cannot be {what}: {reason}; {GO_ON}")


class _ShortError(Exception):
    """Fewer bytes than asked for; how many."""


_REASONS = {
    "Connection refused": "the connection is refused",
    "dns error": "the host is not found",
    "certificate": "its certificate is not accepted",
    "TimedOut": "no answer in time",
    "Connect": "no connection",
    "IncompleteBody": "the answer breaks off each time",
    "error sending request": "no connection",
}


def _broke_off(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, _ShortError) or ("body error" in text and "max_retries" not in text)
