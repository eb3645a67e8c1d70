"""Reading and writing of the activation store beside raw files and zarr's own pipeline, and what codecs and compression cost.

    .venv/bin/python -m scripts.bench_store path/to/activations.npy [--sae path/to/sae --write]

The file holds real activations `[N, D]` float32. Each repetition takes every implementation in turn. All of them write to the same
disk and flush before the clock stops; all of them read files that were just written and lie in the page cache. `--write` puts the
tables into benchmarks/store_cpu.md; `--sae` adds the FVU of a trained SAE on what each codec gives back.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import zarr

from saekit.activations.codec import CODECS, Codec, token_bytes
from saekit.activations.layout import ShardRecord, shard_spans
from saekit.activations.reader import ShardReader
from saekit.activations.shardfile import Compression, chunk_shape
from saekit.activations.windows import aligned
from saekit.activations.writer import Shard, write_shard
from saekit.manifest import software_versions

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "store_cpu.md"
CONTEXT_LEN = 128
SHARD_ROWS = 256

Times = dict[str, list[tuple[float, float]]]
Array = np.ndarray[Any, Any]


def timed(times: Times, name: str, function: Callable[[], object]) -> None:
    """Adds wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    times.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - cpu))


def write_store(folder: Path, rows: Array, codec: Codec, compression: Compression, d_in: int) -> list[ShardRecord]:
    """Writes stored rows `[R, T, W]` as shards, each committed; returns their records."""
    norm = np.zeros(rows.shape[:2], np.float32)
    records = []
    for span in shard_spans(len(rows), SHARD_ROWS):
        part = slice(span.first_row, span.first_row + span.num_rows)
        shard = Shard(
            folder=folder,
            cache="0" * 64,
            hook_point="bench",
            span=span,
            dtype=codec.name,
            compression=compression,
            chunk=chunk_shape(CONTEXT_LEN, [token_bytes(codec.name, d_in)]),
            d_in=d_in,
            activations=rows[part],
            norm=norm[part],
        )
        records.append(write_shard(shard))
    return records


def write_memmap(path: Path, rows: Array) -> None:
    """Writes the same bytes as one raw file."""
    file = np.memmap(path, dtype=rows.dtype, mode="w+", shape=rows.shape)
    file[...] = rows
    file.flush()


def shuffled_chunks(reader: ShardReader, out: Array, seed: int) -> None:
    """Reads every chunk once in random order."""
    order = np.random.default_rng(seed).permutation(len(reader.bounds) - 1)
    for chunk in order.tolist():
        reader.chunks(np.array([chunk]), out[reader.bounds[chunk] : reader.bounds[chunk + 1]])


def windows(reader: ShardReader, out: Array, seed: int) -> None:
    """Reads every chunk once, a random quarter of them after another, each in ascending order, as a training does."""
    starts, sizes = reader.bounds[:-1], np.diff(reader.bounds)
    place = 0
    for part in np.array_split(np.random.default_rng(seed).permutation(len(starts)), 4):
        chunks = np.sort(part)
        tokens = int(sizes[chunks].sum())
        reader.chunks(chunks, out[place : place + tokens])
        place += tokens


def shuffled_zarr(folder: Path, out: Array, chunk_tokens: int, seed: int) -> None:
    """Reads the same blocks in random order through zarr."""
    arrays = [zarr.open_group(path, mode="r")["activations"] for path in sorted(folder.glob("shard-*.zarr"))]
    blocks = [
        (number, row, position)
        for number, array in enumerate(arrays)
        for row in range(array.shape[0])
        for position in range(0, CONTEXT_LEN, chunk_tokens)
    ]
    np.random.default_rng(seed).shuffle(blocks)
    for number, row, position in blocks:
        start = (number * SHARD_ROWS + row) * CONTEXT_LEN + position
        out[start : start + chunk_tokens] = arrays[number][row, position : position + chunk_tokens]


def speeds(x: torch.Tensor, repeats: int, folder: Path) -> Iterator[str]:
    """Yields the lines of the table of the plain bfloat16 store beside raw files and zarr."""
    codec, d_in = CODECS["bfloat16"], x.shape[1]
    flat = codec.to_array(codec.encode(x))
    rows = flat.reshape(-1, CONTEXT_LEN, d_in)
    writes: Times = {}
    reads: Times = {}
    out = aligned(*flat.shape, flat.dtype)
    for repeat in range(repeats + 1):
        place = folder / str(repeat)
        place.mkdir()
        (place / "store").mkdir()
        records: list[ShardRecord] = []
        taken: tuple[Times, Times] = (writes, reads) if repeat else ({}, {})
        timed(taken[0], "numpy.memmap", lambda at=place: write_memmap(at / "raw", rows))
        timed(
            taken[0],
            "saekit",
            lambda at=place, to=records: to.extend(write_store(at / "store", rows, codec, "none", d_in)),
        )
        raw = np.memmap(place / "raw", dtype=flat.dtype, mode="r", shape=flat.shape)
        reader = ShardReader(place / "store", records, context_len=CONTEXT_LEN)
        chunk_tokens = records[0].chunk.positions
        timed(taken[1], "numpy.memmap, in order", lambda file=raw: np.copyto(out, file))
        timed(
            taken[1], "saekit, chunks in random order, checked", lambda r=reader, s=repeat: shuffled_chunks(r, out, s)
        )
        assert np.array_equal(out, flat)
        timed(taken[1], "saekit, windows of a quarter, checked", lambda r=reader, s=repeat: windows(r, out, s))
        timed(
            taken[1],
            "zarr, the same chunks",
            lambda at=place, s=repeat, c=chunk_tokens: shuffled_zarr(at / "store", out, c, s),
        )
        assert np.array_equal(out, flat)
        shutil.rmtree(place)
    for title, times in (("write", writes), ("read", reads)):
        base = [wall for wall, _ in next(iter(times.values()))]
        yield from ("", f"| {title} | GB/s | rows/s | x memmap | CPU s |", "|---|---:|---:|---:|---:|")
        for name, pairs in times.items():
            walls = [wall for wall, _ in pairs]
            ratios = [theirs / ours for theirs, ours in zip(base, walls, strict=True)]
            gb = [flat.nbytes / 1e9 / wall for wall in walls]
            yield (
                f"| {name} | {statistics.median(gb):.2f} ({min(gb):.2f} - {max(gb):.2f}) | {statistics.median(gb) * 1e9 / flat[0].nbytes:,.0f}"
                f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | {statistics.median(cpu for _, cpu in pairs):.2f} |"
            )


def compressions(x: torch.Tensor, folder: Path) -> Iterator[str]:
    """Yields the table of size and rates of each codec and compression."""
    yield from (
        "",
        "| codec | compression | bytes, x bfloat16 | write GB/s of bfloat16 | read |",
        "|---|---|---:|---:|---:|",
    )
    plain = x.numel() * 2
    for name in ("bfloat16", "float16", "int8", "float8_e4m3"):
        codec = CODECS[name]
        rows = codec.to_array(codec.encode(x)).reshape(-1, CONTEXT_LEN, codec.width(x.shape[1]))
        for compression in get_args(Compression):
            times: Times = {}
            place = folder / f"{name}-{compression}"
            place.mkdir()
            records: list[ShardRecord] = []
            timed(
                times,
                "write",
                lambda a=(place, rows, codec, compression), to=records: to.extend(write_store(*a, x.shape[1])),
            )
            reader = ShardReader(place, records, context_len=CONTEXT_LEN)
            out = aligned(len(x), rows.shape[2], rows.dtype)
            timed(times, "read", lambda r=reader, o=out: shuffled_chunks(r, o, 0))
            size = sum(file.size_bytes for record in records for path, file in record.files.items() if "/c/" in path)
            write, read = (plain / 1e9 / times[key][0][0] for key in ("write", "read"))
            yield f"| {name} | {compression} | {size / plain:.3f} | {write:.2f} | {read:.2f} |"
            shutil.rmtree(place)


def losses(x: torch.Tensor, folder: Path) -> Iterator[str]:
    """Yields the table of errors of each codec, and the FVU of an SAE that reads what it gives back."""
    from saekit.sae.checkpoint import load_sae_folder

    sae = load_sae_folder(folder)
    norm = x.norm(dim=1)
    normal = norm <= 10 * norm.median()
    mean = x[normal].double().mean(0)
    largest = x[normal].abs().mean(0).argmax()

    def fvu(given: torch.Tensor) -> float:
        error = total = 0.0
        for seen, true in zip(given[normal].split(2048), x[normal].split(2048), strict=True):
            with torch.no_grad():
                error += float((sae(seen).x_hat - true).double().square().sum())
            total += float((true.double() - mean).square().sum())
        return error / total

    yield from (
        "",
        "| codec | error / variance, normal tokens | of the dimension with the largest mean | relative error, massive tokens | SAE's FVU |",
        "|---|---:|---:|---:|---:|",
    )
    yield f"| float32 | 0 | 0 | 0 | {fvu(x):.5f} |"
    for name in ("bfloat16", "float16", "int8", "float8_e4m3"):
        codec = CODECS[name]
        found = codec.decode(codec.encode(x)).float()
        off = (found - x).double().square()
        share = off[normal].sum() / (x[normal].double() - mean).square().sum()
        outlier = off[normal, largest].sum() / (x[normal, largest].double() - mean[largest]).square().sum()
        massive = (
            (off[~normal].sum() / x[~normal].double().square().sum()).sqrt()
            if bool((~normal).any())
            else torch.tensor(0.0)
        )
        yield f"| {name} | {float(share):.2e} | {float(outlier):.2e} | {float(massive):.2e} | {fvu(found):.5f} |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", type=Path, help="an .npy file [N, D] of float32")
    parser.add_argument("--sae", type=Path, help="folder of an SAE that was trained on such activations")
    parser.add_argument("--repeats", type=int, default=5, help="after one that warms up (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the file (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/store_cpu.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stored = np.load(args.activations, mmap_mode="r")
    x = torch.from_numpy(stored[: min(args.tokens, len(stored)) // CONTEXT_LEN * CONTEXT_LEN].astype(np.float32))
    versions = software_versions()
    lines = [
        "# The activation store on a CPU",
        "",
        "Written by `python -m scripts.bench_store`.",
        "",
        f"- {datetime.now(UTC).date()}; {platform.machine()}, {os.cpu_count()} cores; the load before was {os.getloadavg()[0]:.1f}. Over"
        " the number of cores, others used the machine too: only ratios of the same row of turns say something.",
        f"- Python {versions['python']}, numpy {versions['numpy']}, torch {versions['torch']}, zarr {versions['zarr']}.",
        f"- {len(x):,} tokens of {x.shape[1]} numbers, rows of {CONTEXT_LEN}, shards of {SHARD_ROWS * CONTEXT_LEN:,} tokens; median of"
        f" {args.repeats} turns, least and most. Written files are flushed, read ones lie in the page cache.",
    ]
    with tempfile.TemporaryDirectory(prefix="saekit-bench-", dir=args.activations.parent) as folder:
        lines += speeds(x, args.repeats, Path(folder))
        lines += compressions(x, Path(folder))
    if args.sae is not None:
        lines += losses(x, args.sae)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
