"""What a run's folder holds, read from its manifests alone."""

from pathlib import Path

from saekit.errors import ConfigError
from saekit.manifest import MANIFEST_NAME, read_manifest

__all__ = ["stage_rows", "verify_cache"]

STAGE_ORDER = ("cache", "train", "label", "evaluate", "report")


def stage_rows(folder: str | Path) -> list[tuple[str, str, str, str]]:
    """Returns one row `(stage, status, produced, finished)` per stage folder under `folder`, in the order of the pipeline.

    Raises:
        ConfigError: the folder does not exist or holds no stage.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r}: no such folder, needs the folder of a run")
    parents = sorted(
        (
            path.parent
            for path in [
                *folder.glob(MANIFEST_NAME),
                *folder.glob(f"*/{MANIFEST_NAME}"),
                *folder.glob(f"*/*/{MANIFEST_NAME}"),
            ]
        ),
        key=lambda path: (_order(path, folder), path),
    )
    if not parents:
        raise ConfigError(f"{str(folder)!r}: no {MANIFEST_NAME} in it, needs the folder of a run")
    rows = []
    for parent in parents:
        manifest = read_manifest(parent)
        if manifest is None:
            continue
        produced = ", ".join(
            f"{key} {_short(value)}" for key, value in manifest.counts.items() if isinstance(value, int | float | str)
        )
        name = parent.relative_to(folder).as_posix() if parent != folder else manifest.stage
        status = "finished" if manifest.status == "complete" else "unfinished"
        rows.append((name, status, produced, (manifest.finished or "").removesuffix("+00:00").replace("T", " ")))
    there = {row[0].split("/")[0] for row in rows}
    if folder not in parents:
        rows += [(stage, "missing", "", "") for stage in STAGE_ORDER if stage not in there]
    return rows


def _order(path: Path, folder: Path) -> int:
    top = path.relative_to(folder).parts[0] if path != folder else ""
    return STAGE_ORDER.index(top) if top in STAGE_ORDER else len(STAGE_ORDER)


def _short(value: int | float | str) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def verify_cache(folder: str | Path, *, repair: bool = False) -> list[str]:
    """Returns one line per shard of a cache that is missing, truncated, changed or foreign; empty = all as written.

    Args:
        repair: also forget those, so that the cache command makes exactly them anew.
    """
    from saekit.activations import verify_store

    return verify_store(folder, repair=repair)
