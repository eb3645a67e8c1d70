"""The peers of the benchmarks: an environment of their own, and processes that answer one line of JSON to each line they get."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "ROOT", "TORCH", "WorkerProcess", "commit_now", "cpu_name", "peer_python"]

ROOT = Path(__file__).resolve().parents[1]
# Later wheels of the package index are CUDA builds of several gigabytes, so this one comes first and stays.
TORCH = "torch==2.13.0"
PEERS = ["sae-lens", "dictionary-learning", "eai-sparsify"]


class WorkerProcess:
    """One implementation in its own process, which waits while others run.

    Attributes:
        name: for messages.
        started: what it said when it was ready.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts it and waits until it is ready.

        Args:
            name: for messages.
            command: program and arguments.
            threads: of its sums.
            environment: variables beside those of this process.
        """
        variables = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            # Threads that spin while another implementation runs would take its time.
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            # Its kernels are for CUDA; with triton installed it would try them on the CPU.
            "SPARSIFY_DISABLE_TRITON": "1",
        }
        self.name = name
        self.process = subprocess.Popen(
            list(command),
            env=variables | dict(environment or {}),
            cwd=ROOT / "benchmarks",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started = self.answer()

    def ask(self, what: str) -> dict[str, Any]:
        """Sends one line and returns the answer."""
        self.tell(what)
        return self.answer()

    def tell(self, what: str) -> None:
        """Sends one line; its answer is to be taken by `answer`."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Lets the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def answer(self) -> dict[str, Any]:
        """Waits for the next answer and returns it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()}, see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def peer_python(environment: Path, peers: Sequence[str] = PEERS) -> Path:
    """Returns the Python of the peers' environment, which is made where it is missing.

    Raises:
        subprocess.CalledProcessError: they cannot be installed.
    """
    python = environment / "bin" / "python"
    if not (environment / ".installed").exists():
        print(f"installing {', '.join(peers)} into {environment.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", TORCH], check=True)
        subprocess.run([*pip, "install", "torch<2.14", *peers], check=True)
        # Its wheel in the index is built for CUDA, and makes transformers fail beside a torch that is not.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        (environment / ".installed").touch()
    return python


def commit_now() -> str:
    """Which saekit this is."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[-1].strip() for line in info.splitlines() if line.startswith("model name")]
    return (names or ["unknown processor"])[0]
