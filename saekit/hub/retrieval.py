"""A release, or some of its dictionaries, from the hub to this machine."""

import fnmatch
import shutil
from collections.abc import Mapping
from pathlib import Path

from saekit.errors import ConfigError, FormatError
from saekit.hub.discover import config_names, dictionaries
from saekit.hub.hashes import check_hashes
from saekit.hub.place import ORIGIN_NAME, Place, locate, shown
from saekit.hub.resolve import the_one
from saekit.manifest import atomic_write, file_sha256, write_json
from saekit.progress import Progress

__all__ = ["pull"]


def pull(
    ref: str,
    *,
    to: str | Path | None = None,
    pattern: str | None = None,
    revision: str | None = None,
    sha256: str | Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Downloads a dictionary and the configs beside it; returns its folder, or its file.

    What the hub's cache has is not downloaded again, and a download that was cut goes on at the byte where it ended.

    Args:
        ref: `owner/repo:sub/path`, or a name that `saekit ls` lists.
        to: a folder for copies of the files, which then load from there as from the hub; None: the hub's cache only.
        pattern: which dictionaries of a folder of several, as in a shell: `layer_12/*`; None: the only one.
        revision: branch, tag or commit.
        sha256: as in `load_sae`; for one dictionary.
        progress: None: the bars of huggingface_hub.

    Raises:
        ConfigError: `ref` is here already, or `to` holds other files.
        FormatError: there is no such dictionary, it may not be read, or it is not the one that was meant.
    """
    place = locate(ref, revision)
    if place.hub is None:
        raise ConfigError(f"pull: {ref!r} is here already, needs a place on the hub")
    found = dictionaries(place.names)
    names = [the_one(place)] if pattern is None else [name for name in found if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise FormatError(
            f"sae {place.ref!r}: none is named like {pattern!r}, needs one of {shown(list(found), place)}"
        )
    if sha256 is not None and len(names) > 1:
        raise ConfigError(f"pull: a sha256 for {len(names)} dictionaries, needs one; narrow the pattern")
    files = [file for name in names for file in found[name]]
    folder = place.folder_of(files, progress=progress)
    if sha256 is not None:
        configs = config_names(place.names, files)
        weights, others = ({name: file_sha256(folder / name) for name in group} for group in (files, configs))
        check_hashes(place.name_of(names[0]), weights, others, sha256)
    if to is not None:
        _copy(place, folder, [*files, *config_names(place.names, files)], Path(to))
        folder = Path(to)
    return folder / names[0] if len(names) == 1 and names[0] else folder


def _copy(place: Place, folder: Path, names: list[str], target: Path) -> None:
    different = [name for name in names if (target / name).is_file() and not _same(folder / name, target / name)]
    if different:
        raise ConfigError(f"pull: {str(target / different[0])!r} is another file, needs a folder without it")
    for name in names:
        if not (target / name).is_file():
            with atomic_write(target / name) as out, (folder / name).open("rb") as content:
                shutil.copyfileobj(content, out, 1 << 20)
    assert place.hub is not None
    path = "" if place.folder == Path() else f":{place.folder.as_posix()}"
    write_json(target / ORIGIN_NAME, {"ref": f"{place.repo}{path}", "repo": place.repo, "revision": place.revision})


def _same(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and file_sha256(first) == file_sha256(second)
