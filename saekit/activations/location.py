"""Where a cache is: in a folder, or at a URL that a folder stands for.

remote.json                 in the folder: url and endpoint, no secrets
"""

import os
from pathlib import Path

from pydantic import Field, ValidationError

from saekit.activations.objects import Objects
from saekit.activations.providers import check_url, is_url
from saekit.activations.remote import Remote
from saekit.config import Config
from saekit.errors import ConfigError, StoreError
from saekit.manifest import MANIFEST_NAME, write_json

__all__ = ["RemoteConfig", "attach", "find_cache"]

_REMOTE_NAME = "remote.json"


class RemoteConfig(Config):
    """Where the shards of a cache lie."""

    url: str = Field(min_length=1)
    """`s3://bucket/folder`, `gs://bucket/folder`, or `http(s)://host/folder`, which can only be read."""
    endpoint: str | None = None
    """Of a service that speaks S3 but is not Amazon's; None = AWS_ENDPOINT_URL, or Amazon's own."""


def find_cache(path: str | Path) -> tuple[Path, Remote | None]:
    """Returns the folder of a cache, and where its shards lie if that is not there.

    Args:
        path: a folder, or a URL, whose small files go to the user's cache folder.

    Raises:
        ConfigError: a URL that is not served.
        ResourceError: no credentials.
        StoreError: a folder whose remote.json cannot be read.
        MissingDependencyError: obstore is not installed.
    """
    if is_url(path):
        url = check_url(str(path))
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = attach(home / "saekit" / "stores" / url.replace("://", "/"), RemoteConfig(url=url))
    else:
        folder = Path(path)
    marker = folder / _REMOTE_NAME
    try:
        config = RemoteConfig.model_validate_json(marker.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return folder, None
    except (ValidationError, OSError) as error:
        raise StoreError(
            f"{str(marker)!r}: cannot be read, needs url and endpoint; remove it and give the URL anew"
        ) from error
    return folder, Remote(config.url, folder, endpoint=config.endpoint)


def attach(folder: Path, config: RemoteConfig | None) -> Path:
    """Returns a folder after making it the place of the small files of the cache at a URL; as it is, where there is no URL.

    Raises:
        ConfigError: no such URL, or the folder holds a cache of its own that is not the one there.
        ResourceError: the folder cannot be written.
    """
    if config is None:
        return folder
    config = config.model_copy(update={"url": check_url(config.url)})
    marker = folder / _REMOTE_NAME
    if not marker.is_file() and (folder / MANIFEST_NAME).is_file():
        try:
            there = Objects(config.url, endpoint=config.endpoint).read(MANIFEST_NAME)
        except FileNotFoundError:
            there = b""
        if there != (folder / MANIFEST_NAME).read_bytes():
            raise ConfigError(
                f"cache {str(folder)!r}: holds a cache of its own, {config.url!r} not the same one; copy the folder there first, or"
                " use another"
            )
    if not marker.is_file() or RemoteConfig.model_validate_json(marker.read_bytes()) != config:
        write_json(marker, config.to_dict())
    return folder
