"""The training's side of the processes that fill a ring: starts them, tells them what may go, and notices their end."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

from saekit.activations.filler import FillerJob, remove_segments
from saekit.activations.ring import Ring
from saekit.activations.segment import read_ledger
from saekit.errors import ResourceError
from saekit.manifest import begin_stage, finish_stage, locked, reopen_stage, write_json

__all__ = ["Fillers", "RingKeeper", "Watcher", "clear_ring"]

FAILED_NAME = "failed.json"
LOG_NAME = "filler.log"
_LOG_BYTES = 4000
_PATIENCE_SECONDS = 10.0
# What a launcher tells a process of the training is none of theirs.
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Fillers(Protocol):
    """Those who fill a ring, as a process of the training sees them."""

    def start(self, job: FillerJob) -> None:
        """Has the ring filled from the job's segment on."""

    def check(self) -> None:
        """Looks whether the ring is still being filled.

        Raises:
            ResourceError: it is not; says why.
        """

    def release(self, number: int) -> None:
        """Says that segments below a number may go."""


def launch(environment: Mapping[str, str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Starts one of the processes, which waits for its job."""
    return subprocess.Popen(
        [sys.executable, "-c", "from saekit.activations.filler import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=log,
        env=environment,
    )


class RingKeeper:
    """The fillers, as the first process of the training has them: it starts and ends them."""

    def __init__(self, ring: Ring) -> None:
        """Claims the ring's folder.

        Raises:
            ConfigError: it holds another ring; the differing keys are named.
            ResourceError: another training uses it, or it cannot be written.
        """
        self._ring = ring
        self._stack = contextlib.ExitStack()
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._is_complete = (
            begin_stage(ring.folder, "ring", ring.identity_values, {"cache": ring.kept_sha256}) == "complete"
        )
        self._stack.enter_context(locked(ring.folder))
        (ring.folder / FAILED_NAME).unlink(missing_ok=True)

    def start(self, job: FillerJob) -> None:
        """Starts one process a device."""
        if self._is_complete:
            # A training was added to those that were done with it.
            reopen_stage(self._ring.folder)
        devices = self._ring.config.devices or ("",)
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_NAMES}
        environment = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC")}
        # Whatever this process has put into its own path.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        if len(devices) > 1:
            environment |= {
                "WORLD_SIZE": str(len(devices)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }
        log = self._stack.enter_context((self._ring.folder / LOG_NAME).open("wb"))
        for rank in range(len(devices)):
            own = environment | ({"RANK": str(rank)} if len(devices) > 1 else {})
            process = launch(own, log)
            self._running.append(process)
            _tell(process, job.model_dump_json())

    def check(self) -> None:
        """Looks whether all of them run.

        Raises:
            ResourceError: one has ended.
        """
        for process in self._running:
            if (code := process.poll()) is not None:
                why = _last_line(self._ring.folder / LOG_NAME) if code > 0 else ""
                how = f"was killed (signal {-code})" if code < 0 else f"ended with {code}{f': {why}' if why else ''}"
                message = (
                    f"ring {str(self._ring.folder)!r}: the process that fills it {how}; checkpoints and whole segments are"
                    " kept: run the same command again to go on"
                )
                write_json(self._ring.folder / FAILED_NAME, {"message": message})
                raise ResourceError(message)

    def release(self, number: int) -> None:
        """Says that segments below a number may go; may be called from any thread."""
        with self._lock:
            if self._running:
                _tell(self._running[0], str(number))

    def close(self) -> None:
        """Ends the processes and gives the folder back."""
        with self._lock:
            running, self._running = self._running, []
        for process in running:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in running:
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stack.close()


class Watcher:
    """The fillers, as the other processes of the training see them: by files that the first one writes and locks."""

    def __init__(self, ring: Ring) -> None:
        """Looks at nothing yet; the first process has the folder's lock already."""
        self._ring = ring

    def start(self, job: FillerJob) -> None:
        """Leaves that to the first process."""

    def check(self) -> None:
        """Looks whether the first process is there and content.

        Raises:
            ResourceError: it is not.
        """
        path = self._ring.folder / FAILED_NAME
        if path.exists():
            raise ResourceError(json.loads(path.read_text(encoding="utf-8"))["message"])
        try:
            with locked(self._ring.folder):
                pass
        except ResourceError:
            return
        raise ResourceError(
            f"ring {str(self._ring.folder)!r}: the first process of the training has ended, needs all of them; run the same"
            " command again to go on"
        )

    def release(self, number: int) -> None:
        """Leaves that to the first process."""


def clear_ring(ring: Ring) -> None:
    """Removes all segments of a ring that nobody trains on any more; what is known of them stays."""
    with locked(ring.folder):
        remove_segments(ring, keep=range(0))
        segments = read_ledger(ring).segments
        finish_stage(
            ring.folder, {"segments": len(segments), "tokens": sum(segment.num_tokens for segment in segments)}
        )


def _tell(process: "subprocess.Popen[bytes]", line: str) -> None:
    assert process.stdin is not None
    # One that has ended is noticed by `check`, which says why.
    with contextlib.suppress(OSError):
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""
