"""Builds the report: a folder of static files that a browser opens from disk, without a server and without a network."""

import hashlib
import importlib.resources
import shutil
from collections.abc import Sequence
from pathlib import Path

from saekit.errors import ConfigError, ResourceError
from saekit.manifest import begin_stage, finish_stage, manifest_sha256, read_manifest
from saekit.progress import NO_PROGRESS, Progress
from saekit.report.sources import ReportRun, run_inputs
from saekit.report.text import TokenizerLike
from saekit.report.writer import ReportConfig, write_site

__all__ = ["build_report"]


def build_report(
    out: str | Path,
    *,
    title: str,
    store: str | Path,
    runs: Sequence[ReportRun],
    tokenizer: TokenizerLike,
    config: ReportConfig | None = None,
    progress: Progress = NO_PROGRESS,
) -> Path:
    """Builds the site and returns its `index.html`; says so and does nothing where it is already built from the same inputs.

    The site is built beside `out` and takes its place when it is whole; an older report there is replaced.

    Args:
        out: folder of the site.
        title: shown on every page.
        store: folder of the cache that all runs were made from.
        runs: the dictionaries to show; what a run has no folder for is shown as not computed.
        tokenizer: of the model whose activations were cached.
        config: how much of each feature is shown.

    Raises:
        ConfigError: no runs, two of one name, or `out` holds something else than a report.
        StoreError: an input folder is missing, unfinished, or made from another store.
        FormatError: an input file does not hold what it should.
        ResourceError: the disk is full or `out` cannot be written.
    """
    out = Path(out).resolve()
    config = config or ReportConfig()
    _check_names(runs)
    inputs = {"cache": manifest_sha256(store)}
    for run in runs:
        inputs |= run_inputs(run)
    values: dict[str, object] = {
        "title": title,
        "runs": [run.name for run in runs],
        **config.to_dict(),
        # Another version of the pages or of the data they read makes another report.
        "code": _code_sha256(),
    }
    index = out / "index.html"
    if _is_current(out, values, inputs) and index.is_file():
        progress.say(f"report: already built from the same inputs, nothing to do: {index}")
        return index
    building = out.with_name(f".{out.name}.building")
    try:
        shutil.rmtree(building, ignore_errors=True)
        begin_stage(building, "report", values, inputs)
        counts = write_site(
            building, title, store=Path(store), runs=runs, tokenizer=tokenizer, config=config, progress=progress
        )
        finish_stage(building, counts)
        _replace(out, building)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(f"report {str(out)!r}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    progress.say(
        f"report: {counts['features']:,} features, {counts['contexts']:,} contexts,"
        f" {counts['bytes'] / 2**20:.1f} MiB in {counts['files']:,} files: open {index}"
    )
    return index


def _check_names(runs: Sequence[ReportRun]) -> None:
    names = [run.name for run in runs]
    if not names:
        raise ConfigError("report: no runs, needs at least one trained SAE")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"report: runs named {', '.join(map(repr, repeated))} more than once, needs different names")


def _code_sha256() -> str:
    """Returns the hash of this package's files."""
    digest = hashlib.sha256()
    with importlib.resources.as_file(importlib.resources.files("saekit.report")) as folder:
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".py", ".js", ".css", ".j2"}:
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _is_current(out: Path, values: dict[str, object], inputs: dict[str, str]) -> bool:
    """Returns whether `out` holds this very report.

    Raises:
        ConfigError: it holds something that is not a report and must not be replaced.
    """
    if out.is_file():
        raise ConfigError(f"report {str(out)!r}: is a file, needs a folder")
    if not out.is_dir():
        return False
    found = read_manifest(out)
    if found is None:
        if any(out.iterdir()):
            raise ConfigError(f"report {str(out)!r}: holds files that are no report, needs a folder of its own")
        return False
    if found.stage != "report":
        raise ConfigError(f"report {str(out)!r}: holds the output of stage {found.stage!r}, needs a folder of its own")
    return found.status == "complete" and found.config == values and found.inputs == inputs


def _replace(out: Path, building: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    building.rename(out)
    shutil.rmtree(old, ignore_errors=True)
