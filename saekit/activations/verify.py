"""Whether a cache on disk is still what was written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from saekit.activations.layout import (
    INDEX_NAME,
    TOKENS_RECORD_NAME,
    Files,
    HookIndex,
    LocalFiles,
    PartRecord,
    ShardRecord,
    file_problems,
    hook_folder,
    hook_points_of,
    read_record,
    record_name,
    refuse_earlier,
    shard_name,
)
from saekit.activations.location import find_cache
from saekit.activations.store import cache_identity
from saekit.errors import StoreError
from saekit.manifest import MANIFEST_NAME, Manifest, file_sha256, read_manifest, write_manifest

__all__ = ["reopen_stage", "verify_store"]


@dataclass(frozen=True, slots=True)
class _Problem:
    message: str
    record: Path | None
    """What to remove, so that a rerun makes the part anew; None where the rerun needs no hint."""


def verify_store(path: str | Path, *, checksums: bool = True, repair: bool = False) -> list[str]:
    """Returns one line for each part of a cache that is missing, truncated, changed or foreign; none for a sound one.

    An unfinished cache is checked as far as it goes.

    Args:
        path: folder or URL. Of one elsewhere, what is there is checked, whatever of it has been copied here; a web server does not
            tell of foreign files.
        checksums: read every byte; else only presence and length of every file.
        repair: also forget the broken parts, so that running the cache command again makes exactly those anew.

    Raises:
        StoreError: no cache there, or one of an earlier version.
        ResourceError: one elsewhere cannot be reached, or not be repaired as it can only be read.
    """
    path, remote = find_cache(path)
    if remote is None:
        return _verify(path, LocalFiles(), str(path), checksums=checksums, repair=repair)
    if repair:
        remote.check_writable()
    with remote.records() as there:
        problems = _verify(there.folder, there, there.url, checksums=checksums, repair=repair)
        if repair and problems:
            there.push(there.folder / MANIFEST_NAME)
    return problems


def _verify(path: Path, files: Files, where: str, *, checksums: bool, repair: bool) -> list[str]:
    manifest = read_manifest(path)
    if manifest is None or manifest.stage != "cache":
        raise StoreError(f"cache {where!r}: no cache there, needs the output folder of the cache stage")
    refuse_earlier(path)
    problems = list(_problems(path, files, manifest, checksums=checksums))
    if repair and problems:
        for problem in problems:
            if problem.record is not None:
                files.remove(problem.record)
        reopen_stage(path)
    return [problem.message for problem in problems]


def reopen_stage(path: Path) -> None:
    """Declares a finished cache unfinished, so that the next run makes what is missing."""
    manifest = read_manifest(path)
    assert manifest is not None, "the caller has read it"
    write_manifest(path, manifest.model_copy(update={"status": "running", "counts": {}, "finished": None}))


def _problems(path: Path, files: Files, manifest: Manifest, *, checksums: bool) -> Iterator[_Problem]:
    identity = cache_identity(manifest)
    is_complete = manifest.status == "complete"
    recorded = manifest.counts.get("sha256", {})
    content = recorded if isinstance(recorded, dict) else {}
    yield from _part_problems(
        files, path, TOKENS_RECORD_NAME, "token rows", identity, content.get("tokens"), checksums=checksums
    )
    for hook_point in hook_points_of(manifest):
        folder = hook_folder(path, hook_point)
        yield from _shard_problems(files, folder, hook_point, identity, checksums=checksums, is_complete=is_complete)
        if is_complete:
            name = f"{hook_point}: statistics"
            digest = content.get(hook_point)
            yield from _part_problems(files, folder, INDEX_NAME, name, identity, digest, checksums=checksums)


def _part_problems(
    files: Files, folder: Path, record_file: str, name: str, identity: str, digest: str | None, *, checksums: bool
) -> Iterator[_Problem]:
    at = folder / record_file
    try:
        record = read_record(at, HookIndex if record_file == INDEX_NAME else PartRecord)
    except StoreError:
        yield _Problem(f"{name}: {record_file} cannot be read", at)
        return
    if record is None:
        if digest is not None:
            yield _Problem(f"{name}: {record_file} is missing", None)
        return
    if record.cache != identity:
        yield _Problem(f"{name}: {record_file} belongs to another cache", at)
    elif checksums and digest is not None and file_sha256(at) != digest:
        yield _Problem(f"{name}: {record_file} has changed since it was written (sha256 differs)", at)
    for problem in file_problems(folder, record, verify=checksums, files=files):
        yield _Problem(f"{name}: {problem}", at)


def _shard_problems(
    files: Files, folder: Path, hook_point: str, identity: str, *, checksums: bool, is_complete: bool
) -> Iterator[_Problem]:
    expected = _indexed_shards(folder) if is_complete else {}
    found = {int(file.stem.removeprefix("shard-")) for file in folder.glob("shard-*.json")}
    for number in sorted(expected.keys() | found):
        name, at = f"{hook_point}: shard {number}", folder / record_name(number)
        try:
            record = read_record(at, ShardRecord)
        except StoreError:
            yield _Problem(f"{name}: {at.name} cannot be read", at)
            continue
        if record is None:
            yield _Problem(f"{name}: {at.name} is missing", None)
        elif record.cache != identity or record.span.index != number or record.hook_point != hook_point:
            yield _Problem(f"{name}: belongs to another cache, hook point or place", at)
        elif expected and number not in expected:
            yield _Problem(f"{name}: foreign, the cache has {len(expected)} shards", at)
        elif expected and expected[number] != record:
            yield _Problem(f"{name}: {at.name} has changed since it was written", at)
        else:
            for problem in file_problems(folder, record, verify=checksums, files=files):
                yield _Problem(f"{name}: {problem}", at)
            if checksums:
                yield from _foreign_files(files, folder, name, record)
    known = {shard_name(number) for number in expected.keys() | found}
    for entry in files.shards(folder):
        # While a cache is unfinished, a shard without its record is one that a stopped run was about to declare.
        if is_complete and entry not in known:
            yield _Problem(f"{hook_point}: {entry} is foreign, no shard of this cache has that number", None)


def _indexed_shards(folder: Path) -> dict[int, ShardRecord]:
    try:
        index = read_record(folder / INDEX_NAME, HookIndex)
    except StoreError:
        return {}
    return {} if index is None else {shard.span.index: shard for shard in index.shards}


def _foreign_files(files: Files, folder: Path, name: str, record: ShardRecord) -> Iterator[_Problem]:
    for file in files.below(folder / shard_name(record.span.index)):
        relative = file.relative_to(folder).as_posix()
        if relative not in record.files:
            yield _Problem(
                f"{name}: {relative} is foreign, it was not written with the shard",
                folder / record_name(record.span.index),
            )
