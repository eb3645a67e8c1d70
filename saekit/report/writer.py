"""Writes all files of a report into a folder: pages, scripts, and the data of every run in chunks."""

import importlib.resources
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, cast

import jinja2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from saekit import __version__
from saekit.activations import ActivationStore
from saekit.config import Config
from saekit.errors import StoreError
from saekit.evaluation import figures_of, pareto_rows
from saekit.manifest import MANIFEST_NAME, manifest_sha256, read_manifest
from saekit.progress import Progress
from saekit.report.chunks import ContextPieces, feature_chunks, row_chunks
from saekit.report.overview import describe_manifest, describe_run, describe_store
from saekit.report.payload import JSONValue, finite, write_payload
from saekit.report.selection import ContextBlock, select_contexts, used_rows
from saekit.report.sources import ReportRun, RunSource, read_run
from saekit.report.tables import build_index
from saekit.report.text import Pieces, PieceTable, TokenizerLike

__all__ = ["ReportConfig", "write_site"]

SCRIPTS = ("core.js", "charts.js", "judged.js", "overview.js", "query.js", "table.js", "feature.js", "app.js")
STATIC = ("report.css", "theme.js", *SCRIPTS)


class ReportConfig(Config):
    """How much of each feature a report carries."""

    num_top: int = Field(default=20, ge=0)
    """Top contexts shown per feature."""
    num_sampled: int = Field(default=20, ge=0)
    """Contexts of the stratified sample shown per feature."""
    features_per_chunk: int = Field(default=64, ge=1)
    """Features in one data file; a panel loads one such file."""
    rows_per_chunk: int = Field(default=128, ge=1)
    """Whole token rows in one data file; expanding a context loads one."""


class _RunFiles(NamedTuple):
    """A run on its way to disk."""

    slug: str
    source: RunSource
    top: ContextBlock | None
    sampled: ContextBlock | None

    @property
    def blocks(self) -> list[ContextBlock]:
        return [block for block in (self.top, self.sampled) if block is not None]


def write_site(
    folder: Path,
    title: str,
    *,
    store: Path,
    runs: Sequence[ReportRun],
    tokenizer: TokenizerLike,
    config: ReportConfig,
    progress: Progress,
) -> dict[str, int]:
    """Writes the whole site; returns how many features, contexts, files and bytes it holds.

    Raises:
        StoreError, FormatError: an input folder does not hold what it should, or belongs to another store.
        OSError: as the file system says it.
    """
    store_sha256 = manifest_sha256(store)
    files = [
        _select(slug, read_run(run, store_sha256=store_sha256), config)
        for slug, run in zip(_slugs([run.name for run in runs]), runs, strict=True)
    ]
    tokens = _any_store(store)
    rows = used_rows(
        [block for run in files for block in run.blocks], num_rows=tokens.num_rows, context_len=tokens.context_len
    )
    pieces = _collect_pieces(tokenizer, tokens.tokens()[rows], [run.source for run in files])
    shown = ContextPieces(rows, tokens.documents()[rows], pieces)
    num_features = sum(run.source.d_sae for run in files)
    with progress.task("report", num_features, "features") as task:
        data = folder / "data"
        for chunk in row_chunks(shown, config.rows_per_chunk):
            name = f"rows-{cast(int, chunk['start']) // config.rows_per_chunk:04d}"
            write_payload(data / f"{name}.js", name, chunk)
        for run in files:
            index = build_index(run.source, pieces, _peak_tokens(run, tokens), chunk_size=config.features_per_chunk)
            write_payload(data / run.slug / "index.js", f"{run.slug}/index", index)
            for chunk in feature_chunks(
                run.source, run.top, run.sampled, shown, pieces, chunk_size=config.features_per_chunk
            ):
                name = f"{run.slug}/chunk-{cast(int, chunk['start']) // config.features_per_chunk:04d}"
                write_payload(data / f"{name}.js", name, chunk)
                task.advance(cast(int, chunk["count"]))
    write_payload(data / "pieces.js", "pieces", _pieces_payload(pieces, shown, tokens, config))
    write_payload(data / "report.js", "report", _report_payload(title, store, files))
    _write_pages(folder, title)
    written = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME]
    return {
        "features": num_features,
        "contexts": sum(len(block.row) for run in files for block in run.blocks),
        "files": len(written),
        "bytes": sum(path.stat().st_size for path in written),
    }


def _slugs(names: Sequence[str]) -> list[str]:
    """Returns a folder name per run that every file system takes and no two runs share."""
    slugs: list[str] = []
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"
        number, slug = 1, base
        while slug.casefold() in {taken.casefold() for taken in slugs}:
            number += 1
            slug = f"{base}-{number}"
        slugs.append(slug)
    return slugs


def _select(slug: str, source: RunSource, config: ReportConfig) -> _RunFiles:
    if source.contexts is None:
        return _RunFiles(slug, source, None, None)
    top, sampled = select_contexts(source.contexts, num_top=config.num_top, num_sampled=config.num_sampled)
    return _RunFiles(slug, source, top, sampled)


def _hook_points(store: Path) -> list[str]:
    manifest = read_manifest(store)
    found = manifest.config.get("hook_points") if manifest is not None else None
    return [str(name) for name in found] if isinstance(found, list) else []


def _any_store(store: Path) -> ActivationStore:
    """Returns the store at its first hook point; tokens and documents are the same at all of them."""
    return ActivationStore.open(store, next(iter(_hook_points(store)), None))


def _collect_pieces(tokenizer: TokenizerLike, rows: NDArray[np.int32], sources: Sequence[RunSource]) -> Pieces:
    table = PieceTable(tokenizer)
    table.add_rows(rows)
    for source in sources:
        for effects in source.effects.values():
            table.add_tokens(effects.promoted_ids)
            table.add_tokens(effects.suppressed_ids)
        rules = {token for label in source.labels.values() for token in label.rule_tokens}
        table.add_tokens(np.array(sorted(rules), np.int64))
    return table.compact()


def _peak_tokens(run: _RunFiles, store: ActivationStore) -> list[NDArray[np.int32]]:
    if run.top is None:
        return []
    tokens = store.tokens()[run.top.row, run.top.position]
    return np.split(tokens, run.top.offsets[1:-1])


def _pieces_payload(
    pieces: Pieces, shown: ContextPieces, store: ActivationStore, config: ReportConfig
) -> dict[str, JSONValue]:
    return {
        "pieces": cast(JSONValue, pieces.strings),
        "special": cast(JSONValue, pieces.special),
        "rows_per_chunk": config.rows_per_chunk,
        "context_len": shown.context_len,
        "documents": cast(JSONValue, _document_names(store, shown.documents)),
    }


def _document_names(store: ActivationStore, documents: NDArray[np.int32]) -> dict[str, str]:
    """Returns document -> its title, or where it comes from and how it starts."""
    wanted = set(np.unique(documents).tolist())
    names: dict[str, str] = {}
    if not wanted:
        return names
    try:
        with store.documents_path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if record["index"] in wanted:
                    names[str(record["index"])] = (
                        record.get("title") or record.get("start") or record.get("source") or ""
                    )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{str(store.documents_path)!r}: cannot be read: {error}; verify the cache") from error
    return names


def _report_payload(title: str, store: Path, files: Sequence[_RunFiles]) -> dict[str, JSONValue]:
    manifest = read_manifest(store)
    assert manifest is not None, "the store's identity was taken from it"
    present = _hook_points(store)
    # Of several hook points, the norms of the first stand for all.
    named = [run.source.hook_point and run.source.hook_point.split(",")[0] for run in files]
    shown = [hook_point or (present[0] if len(present) == 1 else None) for hook_point in named]
    return {
        "title": title,
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "cache": describe_manifest(manifest),
        "stores": {
            name: describe_store(ActivationStore.open(store, name))
            for name in dict.fromkeys(shown)
            if name is not None and name in present
        },
        "pareto": _pareto([run.source for run in files]),
        "runs": [
            describe_run(run.source) | {"slug": run.slug, "store": hook_point}
            for run, hook_point in zip(files, shown, strict=True)
        ],
    }


def _pareto(runs: Sequence[RunSource]) -> JSONValue:
    """Returns name, place, figures and fronts of the evaluated runs."""
    places = {run.name: _place(run) for run in runs}
    rows = pareto_rows([figures_of(run.name, places[run.name], run.evaluation) for run in runs if run.evaluation])
    return [
        {
            "name": row.figures.name,
            "place": row.figures.place,
            "l0": finite(row.figures.l0),
            "fvu": finite(row.figures.fvu),
            "ce_recovered_zero": finite(row.figures.ce_recovered),
            "fronts": [
                name
                for name, is_on in (("fvu", row.is_on_fvu_front), ("ce_recovered_zero", row.is_on_ce_front))
                if is_on
            ],
        }
        for row in rows
    ]


def _place(run: RunSource) -> str:
    train = run.manifests.get("train")
    target = train.config.get("target_hook_point") if train is not None else None
    return f"{run.hook_point} -> {target}" if target else str(run.hook_point)


def _write_pages(folder: Path, title: str) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saekit.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("index.html.j2").render(title=title, version=__version__, scripts=SCRIPTS)
    (folder / "index.html").write_text(page, encoding="utf-8")
    assets = folder / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    for name in STATIC:
        source = importlib.resources.files("saekit.report").joinpath("static", name)
        (assets / name).write_bytes(source.read_bytes())
