"""Checkpoints: everything a run needs to go on bit for bit, in a folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saekit.errors import FormatError, ResourceError

__all__ = [
    "CHECKPOINTS_NAME",
    "keep_newest",
    "latest_checkpoint",
    "load_checkpoint",
    "publish_checkpoint",
    "write_part",
]

CHECKPOINTS_NAME = "checkpoints"
KEPT_CHECKPOINTS = 2
FULL_BYTES = 64_000_000
"""A disk with less than this left is called full where a checkpoint could not be written."""


def _staging(out: Path, step: int) -> Path:
    return out / CHECKPOINTS_NAME / f".step_{step:08d}"


def write_part(out: Path, step: int, name: str, state: Mapping[str, object]) -> None:
    """Writes one file of the checkpoint of `step` into its hidden staging folder.

    Raises:
        ResourceError: the disk is full or the folder cannot be written.
    """
    folder = _staging(out, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.pt").open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer, which does not say so.
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(out).free
        full = (
            f"the disk is full ({free / 1e6:,.0f} MB free)"
            if free < FULL_BYTES
            else (str(error).splitlines() or ["?"])[0]
        )
        raise ResourceError(
            f"{str(folder)!r}: checkpoint cannot be written: {full}; the one before is kept: free some space and run the"
            " same again to go on"
        ) from error


def publish_checkpoint(out: Path, step: int) -> Path:
    """Renames the staged checkpoint of `step` into place and removes all but the newest two."""
    final = out / CHECKPOINTS_NAME / f"step_{step:08d}"
    try:
        if final.exists():
            shutil.rmtree(final)
        _staging(out, step).rename(final)
        keep_newest(out, KEPT_CHECKPOINTS)
    except OSError as error:
        raise ResourceError(f"{str(final)!r}: checkpoint cannot be put in place: {error.strerror or error}") from error
    return final


def keep_newest(out: Path, count: int) -> None:
    """Removes all but the newest `count` checkpoints."""
    for old in _checkpoints(out)[:-count]:
        shutil.rmtree(old)


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / CHECKPOINTS_NAME).glob("step_*"))


def latest_checkpoint(out: Path) -> Path | None:
    """Returns the newest whole checkpoint, and clears away what a killed run left half-written."""
    for unfinished in (out / CHECKPOINTS_NAME).glob(".step_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    found = _checkpoints(out)
    return found[-1] if found else None


def load_checkpoint(checkpoint: Path, name: str) -> dict[str, Any]:
    """Returns what `write_part` wrote.

    Raises:
        FormatError: the file is missing or broken.
    """
    path = checkpoint / f"{name}.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"{str(path)!r}: cannot be read: {reason}; remove {str(checkpoint)!r} to go on from the one before"
        ) from error
    return state
