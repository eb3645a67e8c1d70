"""Files of a Hugging Face repository in the local cache: what a repository holds, and only what is needed of it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from saekit.errors import FormatError

__all__ = ["HubRef", "Listing", "fetch", "list_files", "parse_hub_ref"]


class HubRef(NamedTuple):
    """A place on the hub."""

    repo: str
    """`owner/name`."""
    path: str
    """Folder or file inside it; "" for all of it."""


class Listing(NamedTuple):
    """The files of one commit."""

    names: tuple[str, ...]
    """Paths inside the repository."""
    revision: str | None
    """The commit."""
    snapshot: Path | None
    """Where the cache holds them, when the hub was not asked."""


def parse_hub_ref(ref: str) -> HubRef | None:
    """Returns what `owner/repo` or `owner/repo:sub/path` names, or None when it cannot be such a reference."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(.*))?", ref)
    if found is None or ".." in ref:
        return None
    return HubRef(found.group(1), (found.group(2) or "").strip("/"))


def list_files(ref: HubRef, *, revision: str | None) -> Listing:
    """Returns the names of a repository's files: the hub's, or the cache's in offline mode or without a connection.

    Raises:
        FormatError: the repository or the revision does not exist, may not be read, or is neither reachable nor cached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    reason = "offline mode"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().model_info(ref.repo, revision=revision)
            return Listing(tuple(file.rfilename for file in info.siblings or ()), info.sha, None)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            where = ref.repo if revision is None else f"{ref.repo}@{revision}"
            raise FormatError(
                f"sae {where!r}: no such folder here, and no such repository or revision on the hub that you may read;"
                " needs one of them; log in with 'hf auth login' if it is gated"
            ) from error
        except Exception as error:
            # Which HTTP library raises here, and so the class, changes with the version of huggingface_hub.
            reason = _first_line(error)
    snapshot = _cached_snapshot(ref.repo, revision)
    if snapshot is None:
        raise FormatError(
            f"sae {ref.repo!r}: no such folder here, not in the hub's cache, and the hub cannot be asked ({reason}),"
            " needs a folder or a connection"
        )
    names = tuple(sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()))
    return Listing(names, snapshot.name, snapshot)


def fetch(ref: HubRef, listing: Listing, names: Iterable[str]) -> Path:
    """Downloads files into the cache, or finds them there; returns the folder that holds them under their own names.

    Raises:
        FormatError: a file cannot be had.
    """
    if listing.snapshot is not None:
        return listing.snapshot
    from huggingface_hub import hf_hub_download

    root = Path()
    for name in names:
        try:
            path = Path(hf_hub_download(ref.repo, name, revision=listing.revision))
        except Exception as error:
            raise FormatError(
                f"sae {ref.repo!r}: {name} cannot be downloaded: {_first_line(error)}, needs a connection; try again"
            ) from error
        root = path.parents[name.count("/")]
    return root


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    name = revision or "main"
    pointer = home / "refs" / name
    commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else name
    snapshot = home / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
