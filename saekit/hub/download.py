"""Files of a Hugging Face repository in the local cache: what a repository holds, and only what is needed of it."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from saekit.errors import FormatError, ResourceError
from saekit.hub.patience import first_line, patiently, refusal
from saekit.hub.transfer import HubFile, client_bars, download_file, partial_bytes, pointer_path
from saekit.manifest import atomic_write, write_json
from saekit.progress import Progress

__all__ = ["HubRef", "Listing", "fetch", "list_files", "parse_hub_ref"]

_WEIGHTS_SUFFIXES = {".safetensors", ".npz", ".pt", ".pth"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubRef(NamedTuple):
    """A place on the hub."""

    repo: str
    """`owner/name`."""
    path: str
    """Folder or file inside it; "" for all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Files of one commit: all, or those around the place that was asked for."""

    names: tuple[str, ...]
    """Paths inside the repository."""
    revision: str | None
    """The commit."""
    snapshot: Path | None = None
    """Where the cache holds them, when the hub was not asked."""
    files: Mapping[str, HubFile] = field(default_factory=dict)
    """Size and hash of each; empty where only the cache was asked and it knows none."""


def parse_hub_ref(ref: str) -> HubRef | None:
    """Returns what `owner/repo` or `owner/repo:sub/path` names, or None when it cannot be such a reference."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(.*))?", ref)
    if found is None or ".." in ref:
        return None
    return HubRef(found.group(1), (found.group(2) or "").strip("/"))


def list_files(ref: HubRef, *, revision: str | None) -> Listing:
    """Returns the files at and under a place: the hub's, or the cache's in offline mode or without a connection.

    A commit that was listed before is not asked for again.

    Raises:
        FormatError: the repository or the revision does not exist, may not be read, or is neither reachable nor cached.
    """
    from huggingface_hub import constants

    known = _remembered(ref.repo, revision, ref.path) if revision and _COMMIT.fullmatch(revision) else None
    if known is not None:
        return Listing(names=tuple(known), revision=revision, files=known)
    reason = "offline mode"
    if not constants.HF_HUB_OFFLINE:
        try:
            return _ask(ref, revision)
        except FormatError:
            raise
        except Exception as error:
            refused = refusal(error, ref.repo, revision)
            if refused is not None:
                raise refused from error
            reason = first_line(error)
    listing = _cached(ref, revision)
    if listing is None:
        raise FormatError(
            f"sae {ref.repo!r}: no such folder here, not in the hub's cache, and the hub cannot be asked ({reason}),"
            " needs a folder or a connection"
        )
    return listing


def fetch(ref: HubRef, listing: Listing, names: Iterable[str], progress: Progress | None = None) -> Path:
    """Downloads files into the cache, or finds them there; returns the folder that holds them under their own names.

    Args:
        progress: None: the bars of huggingface_hub.

    Raises:
        FormatError: a file cannot be had.
        ResourceError: the disk of the cache is too small, or cannot be written.
    """
    wanted, commit = list(names), listing.revision or "main"
    root = pointer_path(ref.repo, commit, "")
    missing = [name for name in wanted if not (root / name).is_file()]
    if not missing:
        return root
    if listing.snapshot is not None:
        raise FormatError(
            f"sae {ref.repo!r}: {missing[0]} is not in the hub's cache, and the hub cannot be asked,"
            " needs a connection; run 'saekit pull' with one"
        )
    sizes = {name: listing.files[name].size for name in missing}
    done = sum(min(sizes[name], partial_bytes(ref.repo, listing.files[name])) for name in missing)
    _check_space(sum(sizes.values()) - done)
    bars = client_bars() if progress is None else progress
    with bars.task(ref.path or ref.repo, sum(sizes.values()), "bytes", done=done) as task:
        for name in missing:
            try:
                download_file(ref.repo, commit, name, listing.files[name], task)
            except (FormatError, ResourceError):
                raise
            except Exception as error:
                raise refusal(error, ref.repo, commit) or FormatError(
                    f"sae {ref.repo!r}: {name} cannot be downloaded: {first_line(error)}, needs a connection;"
                    " what came is kept: try again"
                ) from error
    return root


def _check_space(num_bytes: int) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ResourceError(
            f"{constants.HF_HUB_CACHE!r}: {free / 1e9:,.2f} GB free, needs {num_bytes / 1e9:,.2f} GB;"
            " make room, or set HF_HUB_CACHE to another disk"
        )


def _ask(ref: HubRef, revision: str | None) -> Listing:
    from huggingface_hub import HfApi

    api = HfApi()
    info = patiently(lambda: api.model_info(ref.repo, revision=revision, expand=["sha"]))
    commit = info.sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise FormatError(f"sae {ref.repo!r}: the hub names commit {commit!r}, needs a hash")
    files = _remembered(ref.repo, commit, ref.path)
    if files is None:
        folder, files = _tree(ref, commit)
        _remember(ref.repo, commit, folder, files)
    if revision != commit:
        # So that the client, and we without a connection, find the commit that a branch had.
        with contextlib.suppress(ResourceError), atomic_write(_reference(ref.repo, revision)) as file:
            file.write(commit.encode())
    return Listing(names=tuple(files), revision=commit, files=files)


def _tree(ref: HubRef, commit: str) -> tuple[str, dict[str, HubFile]]:
    """Returns the folder that was listed, and its files: that of the place, or the nearest one above that exists."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    folder = PurePosixPath(ref.path)
    if folder.suffix in _WEIGHTS_SUFFIXES:
        folder = folder.parent
        folder = folder.parent if folder.name == "checkpoints" else folder
    while True:
        path = "" if folder == PurePosixPath() else str(folder)
        try:
            # The client itself asks again here, page by page.
            entries = list(api.list_repo_tree(ref.repo, path or None, recursive=True, revision=commit))
            break
        except EntryNotFoundError:
            if not path:
                return "", {}
            folder = folder.parent
    found = {}
    for entry in entries:
        if isinstance(entry, RepoFile):
            found[entry.path] = HubFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            if ".." in PurePosixPath(entry.path).parts or not re.fullmatch(r"[0-9a-f]{40,64}", found[entry.path].oid):
                raise FormatError(f"sae {ref.repo!r}: the hub lists {entry.path!r}, needs a path and a hash")
    return path, dict(sorted(found.items()))


def _cached(ref: HubRef, revision: str | None) -> Listing | None:
    pointer = _reference(ref.repo, revision)
    commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else revision or "main"
    snapshot = pointer_path(ref.repo, commit, "")
    files = _remembered(ref.repo, commit, ref.path)
    if files is not None:
        return Listing(names=tuple(files), revision=commit, snapshot=snapshot, files=files)
    if not snapshot.is_dir():
        return None
    names = tuple(sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()))
    return Listing(names=names, revision=commit, snapshot=snapshot)


def _reference(repo: str, revision: str | None) -> Path:
    return pointer_path(repo, "", "").parent / "refs" / (revision or "main")


def _memory(repo: str, commit: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "saekit" / "listings" / repo.replace("/", "--") / f"{commit}.json"


def _remembered(repo: str, commit: str | None, path: str) -> dict[str, HubFile] | None:
    """Returns what was listed of a commit before, None where that does not reach `path`.

    Without it, the files that a cut download left in the cache would pass for the whole dictionary.
    """
    if commit is None:
        return None
    try:
        held = json.loads(_memory(repo, commit).read_text(encoding="utf-8"))
        if not any(folder in {"", path} or path.startswith(f"{folder}/") for folder in held["folders"]):
            return None
        return {name: HubFile(int(size), str(oid)) for name, (size, oid) in held["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remember(repo: str, commit: str, folder: str, files: Mapping[str, HubFile]) -> None:
    path = _memory(repo, commit)
    folders, known = {folder}, {name: list(file) for name, file in files.items()}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        held = json.loads(path.read_text(encoding="utf-8"))
        folders, known = folders | set(held["folders"]), {**held["files"], **known}
    merged = {"folders": sorted(folders), "files": known}
    # A cache that cannot be written is asked again next time.
    with contextlib.suppress(ResourceError):
        write_json(path, merged)
