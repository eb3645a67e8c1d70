"""Where a reference leads: the names of the files under it, and the folder that holds those of one dictionary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from saekit.errors import FormatError
from saekit.hub.discover import config_names, dictionaries
from saekit.hub.download import HubRef, Listing, fetch, list_files, parse_hub_ref
from saekit.hub.patience import close_names
from saekit.hub.registry import known_names, place_of
from saekit.hub.release import read_mapping
from saekit.manifest import read_manifest
from saekit.progress import Progress
from saekit.sae.checkpoint import CFG_NAME

__all__ = ["ORIGIN_NAME", "Place", "locate", "shown"]

ORIGIN_NAME = "saekit-origin.json"
"""Beside copies of a release's files: the place on the hub that they come from, which some formats' readers need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A local folder, or a folder of a hub repository of which nothing need be here yet."""

    ref: str
    """As the user wrote it; the place on the hub for a name of the registry."""
    names: tuple[str, ...]
    """Files under it, as paths relative to it."""
    folder: Path
    """On disk; inside the repository for a place on the hub."""
    is_file: bool = False
    """Whether the reference names one weights file, which `names` then has beside its configs."""
    hub: tuple[HubRef, Listing] | None = None
    """Where to get the files."""
    origin: tuple[str, str | None] | None = None
    """Hub repository and commit that a local folder is a copy of."""

    @property
    def repo(self) -> str | None:
        """Hub repository; None for a local folder that is not known to come from one."""
        if self.hub is not None:
            return self.hub[0].repo
        return None if self.origin is None else self.origin[0]

    @property
    def revision(self) -> str | None:
        """Commit of the repository; None for a local folder that is not known to come from one."""
        if self.hub is not None:
            return self.hub[1].revision
        return None if self.origin is None else self.origin[1]

    def name_of(self, dictionary: str) -> str:
        """Returns the reference of one dictionary under this place."""
        if not dictionary or self.is_file:
            return self.ref
        separator = ":" if self.repo is not None and ":" not in self.ref else "/"
        return f"{self.ref}{separator}{dictionary}"

    def folder_of(self, files: Sequence[str], *, progress: Progress | None = None) -> Path:
        """Returns the local folder under which these files are, and the configs beside them; downloads what is not there."""
        if self.hub is None:
            return self.folder
        wanted = [*files, *config_names(self.names, files)]
        root = fetch(*self.hub, [(self.folder / name).as_posix() for name in wanted], progress)
        return root / self.folder


def locate(ref: str | Path, revision: str | None) -> Place:
    """Returns the place that a reference names; asks the hub for file names, downloads nothing.

    Raises:
        FormatError: there is no such folder, file or repository, a revision of a local one is asked for, or its training has
            not finished.
    """
    path = Path(ref)
    if revision is not None and path.exists():
        raise FormatError(
            f"sae {str(ref)!r}: revision {revision!r} of a local {'folder' if path.is_dir() else 'file'}, needs none, or a"
            " place on the hub"
        )
    if path.is_file():
        configs = config_names((entry.name for entry in path.parent.iterdir()), [path.name])
        ref, origin = _origin(path, str(ref))
        return Place(ref=ref, names=(path.name, *configs), folder=path.parent, is_file=True, origin=origin)
    if path.is_dir():
        manifest = read_manifest(path)
        if manifest is not None and manifest.stage == "train" and not (path / CFG_NAME).is_file():
            raise FormatError(f"sae {str(ref)!r}: training has not finished; run it again to resume it")
        names = sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file())
        ref, origin = _origin(path, str(ref))
        return Place(ref=ref, names=tuple(names), folder=path, origin=origin)
    if isinstance(ref, str):
        ref = place_of(ref) or ref
    hub = parse_hub_ref(ref) if isinstance(ref, str) else None
    if hub is None:
        near = close_names(str(ref).split("/")[0], known_names())
        hint = f"; did you mean {near}?" if near else ""
        raise FormatError(
            f"sae {str(ref)!r}: no such folder, needs the output folder of a training run, a release,"
            f" 'owner/repo:sub/path' on the hub, or a name that 'saekit ls' lists{hint}"
        )
    listing = list_files(hub, revision=revision)
    if hub.path in listing.names:
        folder = Path(hub.path).parent
        names = [hub.path, *config_names(listing.names, [hub.path])]
    else:
        folder = Path(hub.path)
        names = [name for name in listing.names if folder == Path() or name.startswith(f"{hub.path}/")]
    if not names:
        raise FormatError(f"sae {ref!r}: {hub.repo!r} has no {hub.path!r}, needs one of {_near(hub.path, listing)}")
    relative = tuple(Path(name).relative_to(folder).as_posix() for name in names)
    return Place(ref=str(ref), names=relative, folder=folder, is_file=hub.path in listing.names, hub=(hub, listing))


def shown(names: object, place: Place | None = None) -> str:
    """Returns the first few names for a message, as references of `place`."""
    listed = [str(name) for name in names] if isinstance(names, dict | list | tuple) else []
    if not listed:
        return "none"
    quoted = ", ".join(repr(name if place is None else place.name_of(name)) for name in listed[:5])
    return quoted + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _origin(path: Path, ref: str) -> tuple[str, tuple[str, str | None] | None]:
    """Returns the reference that a local file or folder has on the hub, and the repository, where a copy's record says so."""
    absolute = path.absolute()
    for folder in (absolute, *absolute.parents):
        record = folder / ORIGIN_NAME
        if not record.is_file():
            continue
        values = read_mapping(record)
        start, repo, revision = (values.get(key) for key in ("ref", "repo", "revision"))
        if not isinstance(start, str) or not isinstance(repo, str) or not isinstance(revision, str | None):
            raise FormatError(f"{str(record)!r}: names no place on the hub, needs what 'saekit pull' wrote; remove it")
        below = absolute.relative_to(folder).as_posix()
        separator = "/" if ":" in start else ":"
        return (start if below == "." else f"{start}{separator}{below}"), (repo, revision)
    return ref, None


def _near(path: str, listing: Listing) -> str:
    """Returns the places of a repository that are most like one that is not there, for a message."""
    found = list(dictionaries(listing.names))
    parents = {str(parent) for name in found for parent in PurePosixPath(name).parents} - {"."}
    return close_names(path, [*found, *sorted(parents)]) or shown(found)
