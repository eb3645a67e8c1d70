"""An S3 server that tests start, the ways to it, and a small cache to hold what is there against."""

import itertools
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from saekit.activations import CacheConfig, cache_activations, objects, providers
from saekit.models import LanguageModel
from tests.saekit.activations.remote.servers import SECRET, Proxy, proxy, upload


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Of an S3 server with the bucket `bucket`."""
    boto3, moto_server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port: int = server.get_host_and_port()[1]
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(
        Bucket="bucket", ACL="public-read-write"
    )
    yield port
    server.stop()


def settle(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers._RETRY, "max_retries", 3)
    monkeypatch.setitem(providers._RETRY["backoff"], "init_backoff", timedelta(milliseconds=1))
    monkeypatch.setattr(objects, "_FIRST_PAUSE", 0.001)
    for name, value in {
        "XDG_CACHE_HOME": str(home / "home"),
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "GOOGLE_BEARER_TOKEN": SECRET,
        "AWS_CONFIG_FILE": str(home / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of the test's own, with credentials; nothing is retried for long."""
    settle(tmp_path, monkeypatch)


_numbers = itertools.count()


@pytest.fixture
def url(s3_port: int, here: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an empty folder on the S3 server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    return f"s3://bucket/runs/{next(_numbers)}"


@pytest.fixture
def way(url: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A way to the S3 server that can fail."""
    with proxy(s3_port) as between:
        for name in ("AWS_ENDPOINT_URL", "GOOGLE_BASE_URL"):
            monkeypatch.setenv(name, between.url)
        yield between


@pytest.fixture(scope="session")
def config(make_config: Callable[..., CacheConfig]) -> CacheConfig:
    """Of a cache of two shards at each of two hook points."""
    return make_config(hook_points=["model.layers.1", "model.layers.0:input"], num_tokens=800)


@pytest.fixture(scope="session")
def small(config: CacheConfig, lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That cache on this machine; not to be changed."""
    out = tmp_path_factory.mktemp("small") / "cache"
    cache_activations(config, out, lm=lm)
    return out


@pytest.fixture(scope="session")
def tree(small: Path) -> dict[str, bytes]:
    """Bytes of every file of that cache but the manifest, which holds times of day."""
    names = {path: path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for path, name in names.items() if name not in ("manifest.json", ".lock")}


@pytest.fixture(scope="session")
def uploaded(small: Path, s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of that cache on the S3 server; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        settle(tmp_path_factory.mktemp("uploading"), patch)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
        upload(small, "s3://bucket/uploaded")
    return "s3://bucket/uploaded"
