"""Runs the quickstart recipe on the prepared model and text, and keeps what it cost; called by scripts/quickstart."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from saekit_pipelines.console import make_progress

from saekit.config import apply_overrides, read_toml
from saekit.errors import SaekitError
from saekit.manifest import software_versions, write_json
from scripts.prepare_quickstart import Prepared, default_home, prepare

__all__ = ["SHORT", "main", "overrides_for"]

ROOT = Path(__file__).parents[1]
RECIPE = Path("pipelines/recipes/quickstart.toml")
SHORT = (
    "out=runs/quickstart-short",
    "cache.num_tokens=16_384",
    "train.topk.sae.d_sae=1_152",
    "train.topk.training.num_tokens=49_152",
    "train.jumprelu.sae.d_sae=1_152",
    "train.jumprelu.training.num_tokens=49_152",
    "label.token_change.num_features=16",
    "evaluate.num_tokens=4_096",
    "evaluate.num_loss_tokens=1_024",
    "evaluate.num_fit_tokens=4_096",
)
"""What `--short` changes: every stage runs, on too little data for good features."""
MAX_CALLS = 20
"""Calls remembered in timings.json."""


def overrides_for(prepared: Prepared, given: Sequence[str], *, short: bool) -> list[str]:
    """Returns the recipe's overrides: the prepared paths, those of `--short`, then the user's, of which the last one counts."""
    paths = [
        f"cache.model.name={json.dumps(str(prepared.model))}",
        f"cache.text.paths=[{json.dumps(str(prepared.text))}]",
    ]
    return [*paths, *(SHORT if short else ()), *given]


def run_pipeline(overrides: Sequence[str]) -> tuple[int, float, int]:
    """Runs `saekit run` and returns its exit code, seconds and peak memory in bytes.

    The terminal sends Ctrl-C to the child as well, which then finishes its unit of work; this process waits for it. Anything
    else that asks this process to stop is handed on.
    """
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "saekit_pipelines", "run", str(RECIPE), *overrides])

    def hand_on(signum: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, lambda signum, frame: None), signal.signal(signal.SIGTERM, hand_on)
    try:
        # Not Popen.wait: only wait4 tells the memory of this child apart from that of pip.
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return process.returncode, time.monotonic() - started, peak


def remember(path: Path, call: dict[str, object]) -> None:
    """Appends one call to timings.json; a file that cannot be read is begun anew."""
    try:
        calls = json.loads(path.read_text(encoding="utf-8"))["calls"]
    except (OSError, ValueError, KeyError, TypeError):
        calls = []
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": _memory_bytes(), **software_versions()}
    write_json(path, {"machine": machine, "calls": [*calls, call][-MAX_CALLS:]})


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _minutes(seconds: float) -> str:
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{seconds:.1f} s"


def _conclude(folder: Path, call: dict[str, object]) -> None:
    report = folder.resolve() / "report" / "index.html"
    seconds = {key: value for key, value in call.items() if isinstance(value, float)}
    print(f"\nreport    {report}\n          {report.as_uri()}")
    print(
        f"time      installation {_minutes(seconds['install_seconds'])}, download {_minutes(seconds['download_seconds'])}, "
        f"conversion {_minutes(seconds['convert_seconds'])}; pipeline {_minutes(seconds['pipeline_seconds'])}"
    )
    peak = call["peak_memory_bytes"]
    assert isinstance(peak, int)
    print(f"memory    {peak / 1e9:.2f} GB peak in the pipeline\nkept in   {folder / 'timings.json'}")


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="scripts/quickstart")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--install-seconds", type=float, default=0.0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    return parsed, parsed.overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares, runs, reports; returns the pipeline's exit code."""
    options, given = _parse(arguments)
    os.chdir(ROOT)
    progress = make_progress()
    try:
        # A typing error should not wait for the download.
        folder = Path(
            str(apply_overrides(read_toml(RECIPE), [*(SHORT if options.short else ()), *given])["out"])
        ).expanduser()
        prepared = prepare(default_home(), progress=progress)
    except SaekitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run scripts/quickstart again to go on", file=sys.stderr)
        return 130
    started = datetime.now(UTC).isoformat(timespec="seconds")
    code, seconds, peak = run_pipeline(overrides_for(prepared, given, short=options.short))
    if code != 0:
        return code
    call: dict[str, object] = {
        "started": started,
        "short": options.short,
        "overrides": given,
        "install_seconds": options.install_seconds,
        "download_seconds": round(prepared.download_seconds, 2),
        "convert_seconds": round(prepared.convert_seconds, 2),
        "pipeline_seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
    }
    remember(folder / "timings.json", call)
    _conclude(folder, call)
    return 0


if __name__ == "__main__":
    sys.exit(main())
