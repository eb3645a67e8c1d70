"""What an artifact folder is: `manifest.json`, written atomically, tells stage, config, inputs and whether it is complete."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from pydantic import Field, ValidationError

from saekit.config import Config, changed_keys, config_sha256
from saekit.errors import ConfigError, ResourceError, StoreError

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "StageState",
    "atomic_write",
    "begin_stage",
    "check_same_config",
    "file_sha256",
    "finish_stage",
    "locked",
    "manifest_sha256",
    "read_manifest",
    "reopen_stage",
    "software_versions",
    "write_json",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"

# It can only be read by setting it, for all threads.
_UMASK = threading.Lock()

StageState = Literal["new", "resume", "complete"]


class Manifest(Config):
    """The record of one artifact folder."""

    schema_version: int = 1
    """Layout of this file; readers refuse a newer one."""
    stage: str
    """Which stage wrote the folder: cache, train, label, evaluate, report."""
    status: Literal["running", "complete"]
    """`running` until every file of the folder is in place."""
    config: dict[str, object]
    """The resolved config, defaults included."""
    config_sha256: str
    """Hash of `config`."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Name of each input artifact -> sha256 of its manifest."""
    counts: dict[str, object] = Field(default_factory=dict)
    """What the stage produced: tokens, shards, steps, features, ..."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Python, platform and package versions that wrote the folder."""
    started: str
    """ISO 8601, UTC."""
    finished: str | None = None
    """ISO 8601, UTC; None while running."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Yields a binary file that takes the place of `path` only when the block ends without an error.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read; artifacts follow the umask like any other file.
        with _UMASK:
            umask = os.umask(0)
            os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise ResourceError(f"{str(path)!r}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode())


def file_sha256(path: str | Path) -> str:
    """Returns the sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def software_versions() -> dict[str, str]:
    """Returns the versions that can change a result: Python, platform and the numerical packages."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    """Read once: it takes 10 ms a package, and nothing that is loaded changes its version."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("saekit", "torch", "triton", "transformers", "tokenizers", "zarr", "numpy", "accelerate"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def read_manifest(folder: str | Path) -> Manifest | None:
    """Returns the folder's manifest, or None where there is none.

    Raises:
        StoreError: the file is there but is not a manifest.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, OSError) as error:
        raise StoreError(
            f"{str(path)!r}: not a manifest that this version can read; remove the folder or point elsewhere"
        ) from error


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes the folder's manifest atomically."""
    write_json(Path(folder) / MANIFEST_NAME, manifest.to_dict())


def manifest_sha256(folder: str | Path) -> str:
    """Returns the identity of a complete artifact: the hash of what its manifest says, times of day left out.

    Raises:
        StoreError: no manifest, or the stage that writes the folder has not finished.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise StoreError(f"{str(folder)!r}: no {MANIFEST_NAME}, needs the output folder of a finished stage")
    if manifest.status != "complete":
        raise StoreError(f"{str(folder)!r}: the {manifest.stage} stage has not finished; run it again to resume it")
    identity = manifest.to_dict()
    for key in ("started", "finished", "versions"):
        identity.pop(key)
    return config_sha256(identity)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from writing to `folder` inside the block; the system frees the lock of a killed one.

    Raises:
        ResourceError: another process holds it, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("w")
    except OSError as error:
        raise ResourceError(f"{str(folder)!r}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(
                f"{str(folder)!r}: another process is writing there, needs a folder of its own; wait for it or stop it"
            ) from error
        except OSError as error:
            raise ResourceError(f"{str(folder)!r}: cannot be locked: {error.strerror or error}") from error
        yield


def check_same_config(folder: str | Path, found: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Checks that a folder was written with the config that is asked for now.

    Raises:
        ConfigError: not so; the differing keys are named.
    """
    differing = changed_keys(found, asked)
    if differing:
        shown = ", ".join(f"{key} ({old!r} there, {new!r} asked)" for key, (old, new) in list(differing.items())[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"{str(folder)!r}: written with another config: {shown}{more}; use another folder or the old values"
        )


def begin_stage(
    folder: str | Path, stage: str, config: Config | Mapping[str, object], inputs: Mapping[str, str] | None = None
) -> StageState:
    """Claims `folder` for a stage and says what is to be done there.

    Returns:
        `new` (empty folder, a running manifest was written), `resume` (an unfinished run of the same config and inputs) or
        `complete` (nothing to do).

    Raises:
        ConfigError: the folder belongs to another stage, another config (the differing keys are named) or other inputs.
        ResourceError: the folder cannot be created or written.
    """
    values = config.to_dict() if isinstance(config, Config) else dict(config)
    given = dict(inputs or {})
    found = read_manifest(folder)
    if found is None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_manifest(
            folder,
            Manifest(
                stage=stage,
                status="running",
                config=values,
                config_sha256=config_sha256(values),
                inputs=given,
                versions=software_versions(),
                started=now,
            ),
        )
        return "new"
    if found.stage != stage:
        raise ConfigError(
            f"{str(folder)!r}: holds the output of stage {found.stage!r}, needs a folder of its own for {stage!r}"
        )
    check_same_config(folder, found.config, values)
    if found.inputs != given:
        names = sorted(name for name in found.inputs.keys() | given.keys() if found.inputs.get(name) != given.get(name))
        raise ConfigError(
            f"{str(folder)!r}: its input {', '.join(names)} has changed since; remove the folder to run the stage anew"
        )
    return "complete" if found.status == "complete" else "resume"


def reopen_stage(folder: str | Path) -> None:
    """Marks a complete folder as running again, for a stage that has more to do there."""
    found = read_manifest(folder)
    assert found is not None, "reopen_stage without begin_stage"
    write_manifest(folder, found.model_copy(update={"status": "running", "finished": None}))


def finish_stage(folder: str | Path, counts: Mapping[str, object]) -> Manifest:
    """Marks a running folder as complete, with what was produced."""
    found = read_manifest(folder)
    assert found is not None, "finish_stage without begin_stage"
    done = found.model_copy(
        update={
            "status": "complete",
            "counts": dict(counts),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    write_manifest(folder, done)
    return done
