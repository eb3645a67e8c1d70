"""An S3 server, which tests start, and the way to it."""

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from saekit.activations import objects
from tests.saekit.activations.remote.servers import Proxy, proxy

SECRET = "wJalrXUtnFEMI-do-not-print"


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    boto3, moto_server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port: int = server.get_host_and_port()[1]
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="bucket")
    yield port
    server.stop()


@pytest.fixture
def s3(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to an S3 server, which can fail; nothing is retried for long."""
    monkeypatch.setitem(objects._RETRY, "max_retries", 3)
    monkeypatch.setitem(objects._RETRY["backoff"], "init_backoff", timedelta(milliseconds=1))
    monkeypatch.setattr(objects, "_FIRST_PAUSE", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with proxy(s3_port) as way:
        for name, value in {
            "AWS_ENDPOINT_URL": way.url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield way


numbers = itertools.count()


@pytest.fixture
def url(s3: Proxy) -> str:
    """Of an empty folder on the S3 server."""
    return f"s3://bucket/runs/{next(numbers)}"

