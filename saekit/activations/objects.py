"""Files on an object store or a web server, by key: read whole or in ranges, several at a time, and written; one line for each error.

obstore repeats requests that no answer comes to, or an answer of the 5xx kind, with growing pauses. What breaks off in the middle of
an answer, or ends early without a word, is asked for again here.
"""

import configparser
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from saekit.errors import ConfigError, MissingDependencyError, ResourceError, SaekitError, StoreError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSStore, HTTPStore, RetryConfig, S3CredentialProvider, S3Store

__all__ = ["GO_ON", "SMALL_BYTES", "AccessError", "Objects", "check_url", "is_url"]

GO_ON = "what is finished stays: run the same command again to go on"

SMALL_BYTES = 16 * 2**20
"""Of one answer; longer files are read in parts."""

_SCHEMES = ("s3", "gs", "http", "https")
_MAX_PARTS = 9_000
_IN_FLIGHT = 32
# Answers that break off, on top of what obstore repeats.
_ATTEMPTS = 5
_FIRST_PAUSE = 0.2
_TIMEOUT = "120s"
# About a minute and a half of pauses altogether.
_RETRY: "RetryConfig" = {
    "max_retries": 12,
    "retry_timeout": timedelta(minutes=4),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2},
}
_AWS_ROLES = (
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
)

_Value = TypeVar("_Value")
_Work = TypeVar("_Work")


def is_url(path: str | Path) -> bool:
    """Returns whether a place is a URL rather than a folder."""
    return isinstance(path, str) and "://" in path


def check_url(url: str) -> str:
    """Returns the URL of a folder without a slash at its end.

    Raises:
        ConfigError: a scheme that is not served, no bucket or host, or secrets in it, which would be written down.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"{url.split('?')[0]!r}: needs a URL that begins with {', '.join(f'{s}://' for s in _SCHEMES)}"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ConfigError(
            f"{shown!r}: given with a user, password or query, needs the plain address of a folder; credentials come from the"
            " environment"
        )
    if not parts.netloc:
        raise ConfigError(f"{url!r}: names no {'host' if parts.scheme.startswith('http') else 'bucket'}, needs one")
    return url.rstrip("/")


class AccessError(ResourceError):
    """No credentials, or ones that may not do what is asked for."""


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
        self._store = _connect(self.url, endpoint)
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="saekit-remote")

    def each(self, function: Callable[[_Work], _Value], work: Iterable[_Work]) -> list[_Value]:
        """Returns what `function` makes of each piece of work, many at a time; it must not call this in turn."""
        return list(self._pool.map(function, work))

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
        for first in range(0, len(starts), _IN_FLIGHT // 4):
            group = starts[first : first + _IN_FLIGHT // 4]
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
            return AccessError(f"{self.url!r}: no credentials found, needs {_credentials(self.url)}")
        if isinstance(error, FileNotFoundError) or status == 404:
            return FileNotFoundError(f"{where}: not found")
        if status in {401, 403}:
            return AccessError(
                f"{where}: cannot be {what}: access denied ({status}), needs credentials that may do so:"
                f" {_credentials(self.url)}"
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


def _credentials(url: str) -> str:
    if url.startswith("s3"):
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role; AWS_SKIP_SIGNATURE=true reads a public bucket"
    if url.startswith("gs"):
        return "GOOGLE_APPLICATION_CREDENTIALS or a service account; GOOGLE_SKIP_SIGNATURE=true reads a public bucket"
    return "a server that gives its files to everyone"


def _connect(url: str, endpoint: str | None) -> "S3Store | GCSStore | HTTPStore":
    try:
        from obstore.store import GCSStore, HTTPStore, S3Store
    except ImportError as error:
        raise MissingDependencyError(f"{url!r}: needs obstore; run: pip install 'saekit[remote]'") from error
    parts = urlsplit(url)
    prefix = parts.path.strip("/") or None
    if parts.scheme == "s3":
        at = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return S3Store(
            parts.netloc,
            prefix=prefix,
            config={} if endpoint is None else {"endpoint": endpoint},
            client_options=_client(at),
            retry_config=_RETRY,
            credential_provider=_profile(url),
        )
    if parts.scheme == "gs":
        return GCSStore(
            parts.netloc,
            prefix=prefix,
            config={} if endpoint is None else {"base_url": endpoint},
            client_options=_client(endpoint or os.environ.get("GOOGLE_BASE_URL")),
            retry_config=_RETRY,
        )
    return HTTPStore(url + "/", client_options=_client(url), retry_config=_RETRY)


def _client(at: str | None) -> "ClientConfig":
    return {"allow_http": (at or "").startswith("http://"), "timeout": _TIMEOUT}


def _profile(url: str) -> "S3CredentialProvider | None":
    """Returns what takes credentials from a profile of the AWS tools, which obstore does not read; None where obstore finds them itself."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    files = [
        Path(os.environ.get(name, default)).expanduser()
        for name, default in (
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
            ("AWS_CONFIG_FILE", "~/.aws/config"),
        )
    ]
    profile, known = os.environ.get("AWS_PROFILE", "default"), configparser.RawConfigParser()
    try:
        known.read(files, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{url!r}: the profiles in ~/.aws cannot be read, needs files that the AWS tools take"
        ) from error
    if not {profile, f"profile {profile}"} & set(known.sections()):
        if "AWS_PROFILE" in os.environ:
            raise ConfigError(f"{url!r}: AWS_PROFILE is {profile!r}, needs the name of a profile in ~/.aws")
        if not any(os.environ.get(name) for name in _AWS_ROLES) and not _is_on_aws():
            raise AccessError(f"{url!r}: no credentials found, needs {_credentials(url)}")
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise MissingDependencyError(
            f"{url!r}: needs boto3 for the profile {profile!r} of ~/.aws; run: pip install 'saekit[remote]'"
        ) from error
    try:
        return Boto3CredentialProvider()
    except ValueError as error:
        raise AccessError(f"{url!r}: no credentials in the profile {profile!r}, needs {_credentials(url)}") from error


def _is_on_aws() -> bool:
    """Returns whether the service that gives a machine its role answers; asked once here, as obstore would ask for minutes."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    try:
        with socket.create_connection(("169.254.169.254", 80), timeout=1.0):
            return True
    except OSError:
        return False
