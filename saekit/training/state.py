"""Checkpoints: everything a run needs to go on bit for bit, in a folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saekit.errors import FormatError, ResourceError
from saekit.training.arrays import restore_tensors
from saekit.training.storage import METADATA_NAME, read_arrays

__all__ = [
    "CHECKPOINTS_NAME",
    "RUN_NAME",
    "cannot_write",
    "keep_newest",
    "latest_checkpoint",
    "load_checkpoint",
    "load_process",
    "load_run",
    "process_name",
    "publish_checkpoint",
    "staging_folder",
    "write_part",
]

CHECKPOINTS_NAME = "checkpoints"
RUN_NAME = "run"
KEPT_CHECKPOINTS = 2
FULL_BYTES = 64_000_000
"""A disk with less than this left is called full where a checkpoint could not be written."""


def staging_folder(out: Path, step: int) -> Path:
    """Returns the hidden folder in which the checkpoint of `step` is written."""
    return out / CHECKPOINTS_NAME / f".step_{step:08d}"


def process_name(rank: int) -> str:
    """Returns the name of the file with what a process has of its own."""
    return f"process_{rank}"


def write_part(folder: Path, name: str, state: Mapping[str, object]) -> None:
    """Writes one file of a checkpoint into its hidden folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.pt").open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())


def cannot_write(out: Path, step: int, reason: str) -> ResourceError:
    """Returns what is said of a checkpoint that could not be written.

    Args:
        out: folder of the SAE.
        step: of the checkpoint.
        reason: what the system or torch said.
    """
    free = shutil.disk_usage(out).free
    # torch reports a full disk as a RuntimeError of its zip writer, which does not say so.
    full = f"the disk is full ({free / 1e6:,.0f} MB free)" if free < FULL_BYTES else reason
    folder = out / CHECKPOINTS_NAME / f"step_{step:08d}"
    return ResourceError(
        f"{str(folder)!r}: checkpoint cannot be written: {full}; the one before is kept: free some space and run the"
        " same again to go on"
    )


def publish_checkpoint(out: Path, step: int) -> Path:
    """Renames the checkpoint of `step` into place, for good, and removes all but the newest two."""
    staging, final = staging_folder(out, step), out / CHECKPOINTS_NAME / f"step_{step:08d}"
    _sync_folder(staging)
    if final.exists():
        # The same step has the same state, and what is there is whole.
        shutil.rmtree(staging)
    else:
        staging.rename(final)
        _sync_folder(final.parent)
    keep_newest(out, KEPT_CHECKPOINTS)
    return final


def keep_newest(out: Path, count: int) -> None:
    """Removes all but the newest `count` checkpoints."""
    for old in _checkpoints(out)[:-count]:
        # Hidden first: a kill while files are removed leaves no half of a checkpoint.
        hidden = old.with_name(f".{old.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(old.rename(hidden))


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / CHECKPOINTS_NAME).glob("step_*"))


def latest_checkpoint(out: Path) -> Path | None:
    """Returns the newest whole checkpoint, and clears away what a killed run left half-written."""
    for unfinished in (out / CHECKPOINTS_NAME).glob(".step_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    found = _checkpoints(out)
    return found[-1] if found else None


def load_run(checkpoint: Path) -> dict[str, Any]:
    """Returns the state that all processes share, whole, however many of them wrote it.

    Checkpoints of versions that wrote all of it as one file are read as well.

    Raises:
        FormatError: a file is missing or broken.
    """
    named = load_checkpoint(checkpoint, RUN_NAME)
    try:
        return restore_tensors(named, read_arrays(checkpoint))
    except Exception as error:  # a damaged file raises anything
        broken = str(checkpoint / METADATA_NAME)
        raise _broken(checkpoint, f"{broken!r} or a file that it names", error) from error


def load_process(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Returns what the process `rank` had of its own, or the first one where there were fewer.

    Raises:
        FormatError: the file is missing or broken.
    """
    has_own = (checkpoint / f"{process_name(rank)}.pt").exists()
    return load_checkpoint(checkpoint, process_name(rank if has_own else 0))


def load_checkpoint(checkpoint: Path, name: str) -> dict[str, Any]:
    """Returns what `write_part` wrote.

    Raises:
        FormatError: the file is missing or broken.
    """
    path = checkpoint / f"{name}.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises anything
        raise _broken(checkpoint, repr(str(path)), error) from error
    return state


def _broken(checkpoint: Path, what: str, error: Exception) -> FormatError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return FormatError(f"{what}: cannot be read: {reason}; remove {str(checkpoint)!r} to go on from the one before")
