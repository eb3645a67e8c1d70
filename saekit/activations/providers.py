"""Ways to object stores and web servers: addresses, credentials as the providers' own tools find them, and patience."""

import configparser
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from saekit.errors import ConfigError, MissingDependencyError, ResourceError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSStore, HTTPStore, RetryConfig, S3CredentialProvider, S3Store

__all__ = ["AccessError", "check_url", "connect", "is_url", "needed_credentials"]

_SCHEMES = ("s3", "gs", "http", "https")
_TIMEOUT = "120s"
# A minute of pauses and more.
_RETRY: "RetryConfig" = {
    "max_retries": 20,
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


class AccessError(ResourceError):
    """No credentials, or ones that may not do what is asked for."""


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


def needed_credentials(url: str) -> str:
    """Returns, for errors, what gives access to a URL."""
    if url.startswith("s3"):
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role; AWS_SKIP_SIGNATURE=true reads a public bucket"
    if url.startswith("gs"):
        return "GOOGLE_APPLICATION_CREDENTIALS or a service account; GOOGLE_SKIP_SIGNATURE=true reads a public bucket"
    return "a server that gives its files to everyone"


def connect(url: str, endpoint: str | None) -> "S3Store | GCSStore | HTTPStore":
    """Returns the folder at a URL, with whatever credentials the environment has; sends nothing yet.

    Raises:
        MissingDependencyError: obstore is not installed, or boto3 for a profile.
        ConfigError: AWS_PROFILE names none.
        AccessError: no credentials.
    """
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
            raise AccessError(f"{url!r}: no credentials found, needs {needed_credentials(url)}")
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
        raise AccessError(
            f"{url!r}: no credentials in the profile {profile!r}, needs {needed_credentials(url)}"
        ) from error


def _is_on_aws() -> bool:
    """Returns whether the service that gives a machine its role answers; asked once here, as obstore would ask for minutes."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    try:
        with socket.create_connection(("169.254.169.254", 80), timeout=1.0):
            return True
    except OSError:
        return False
