"""Tables of scripts/bench_store."""

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from saekit.activations import ActivationStore
from saekit.activations.codec import CODECS
from saekit.activations.rows import MASSIVE, NORMAL
from saekit.activations.shardfile import Compression
from saekit.sae.checkpoint import load_sae_folder
from scripts.bench_peers import WorkerProcess

__all__ = ["Times", "codec_lines", "loss_lines", "read_lines", "write_lines"]

DTYPES = ("bfloat16", "float16", "int8", "float8_e4m3")
CODEC_REPEATS = 3
BASE = "numpy.memmap, bfloat16"


@dataclass
class Times:
    """Of one implementation, one entry a round."""

    wall: list[float] = field(default_factory=list)
    """Seconds."""
    cpu: list[float] = field(default_factory=list)
    """Seconds of the process."""
    amount: list[float] = field(default_factory=list)
    """Bytes written, or tokens read."""

    def add(self, found: Mapping[str, Any], amount: float) -> None:
        """Adds what a worker answered."""
        self.wall.append(found["seconds"])
        self.cpu.append(found["cpu_seconds"])
        self.amount.append(amount)

    @property
    def rates(self) -> list[float]:
        """Amount a second."""
        return [amount / wall for amount, wall in zip(self.amount, self.wall, strict=True)]


def _spread(values: list[float], digits: int = 2) -> str:
    """Median, least and most."""
    median, least, most = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} - {most})"


def write_lines(writes: dict[str, Times], num_tokens: int) -> Iterator[str]:
    """Yields the table of writing."""
    yield from (
        "",
        "## Writing",
        "",
        "All files are on the disk before the clock stops (`flush` of the memmap, `fsync` of the others' files); making the stored form"
        " (casts, codes) is not timed. The ratio is of tokens a second, within a round.",
        "",
        "| | GB/s | tokens/s | x memmap | CPU s | bytes a token |",
        "|---|---:|---:|---:|---:|---:|",
    )
    base = writes[BASE].wall
    for name, times in writes.items():
        ratios = [first / wall for first, wall in zip(base, times.wall, strict=True)]
        tokens = [num_tokens / wall for wall in times.wall]
        yield (
            f"| {name} | {_spread([rate / 1e9 for rate in times.rates])} | {statistics.median(tokens):,.0f} | {_spread(ratios)}"
            f" | {statistics.median(times.cpu):.2f} | {times.amount[0] / num_tokens:,.0f} |"
        )


READS = {
    "batches": (
        "### Batches of float32, files in the page cache",
        "Batches of 4,096 tokens in float32, one epoch. numpy.memmap gives them in order; saekit shuffles the whole store through two windows of a"
        " quarter of it and checks every byte; the peers mix in a buffer of half of it. GB/s are of bfloat16, whatever is stored.",
    ),
    "once": (
        "### The same, files not in the page cache",
        "`posix_fadvise(DONTNEED)` before each; what the host of a virtual machine keeps of its disk is not dropped.",
    ),
    "raw": (
        "### As stored, files in the page cache",
        "Bytes from file to memory: numpy.memmap copied in order, saekit's windows with every chunk checked.",
    ),
    "chunks": (
        "### Random chunks, one by one, files in the page cache",
        "The chunks of saekit's files in random order, each asked for by itself; zarr reads the same files.",
    ),
}


def read_lines(
    reads: dict[str, dict[str, Times]], sequences: dict[str, float], ideal: float, d_in: int
) -> Iterator[str]:
    """Yields the tables of reading; `ideal` is the sequences in a batch of a full shuffle."""
    yield from ("", "## Reading")
    for how, by_name in reads.items():
        title, text = READS[how]
        base = next(iter(by_name.values()))
        first = next(iter(by_name))
        mixed = how == "batches"
        yield from ("", title, "", text, "")
        yield f"| | GB/s | tokens/s | x {first.split(',')[0]} | x, CPU |{' sequences a batch |' if mixed else ''}"
        yield f"|---|---:|---:|---:|---:|{'---:|' if mixed else ''}"
        for name, times in by_name.items():
            ratios = [rate / other for rate, other in zip(times.rates, base.rates, strict=True)]
            cpu = [
                (amount / seconds) / (other / others)
                for amount, seconds, other, others in zip(times.amount, times.cpu, base.amount, base.cpu, strict=True)
            ]
            cells = [
                name,
                _spread([rate * 2 * d_in / 1e9 for rate in times.rates]),
                f"{statistics.median(times.rates):,.0f}",
                _spread(ratios),
                f"{statistics.median(cpu):.2f}",
            ]
            if mixed:
                found = sequences.get(name)
                cells.append("" if found is None else f"{found:,.0f} of {ideal:,.0f}")
            yield f"| {' | '.join(cells)} |"


def codec_lines(worker: WorkerProcess, folder: Path, x: Tensor) -> Iterator[str]:
    """Yields the table of size and speeds of each codec and compression, on real activations."""
    plain = x.numel() * 2
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for _ in range(CODEC_REPEATS):
        for dtype in DTYPES:
            for compression in get_args(Compression):
                place = folder / f"{dtype}-{compression}"
                place.mkdir()
                settings = {"dtype": dtype, "compression": compression}
                written = worker.ask(json.dumps({"do": "write", "folder": str(place), "settings": settings}))
                asked = {"do": "read", "folder": str(place), "how": "raw", "drop": False, "marked": False}
                read = worker.ask(json.dumps(asked))
                found.setdefault((dtype, compression), []).append(
                    (written["bytes"], written["cpu_seconds"], read["cpu_seconds"])
                )
                shutil.rmtree(place)
    yield from (
        "",
        "## Codecs and compressions",
        "",
        f"{len(x):,} real tokens. Speeds are GB of bfloat16 a second of one core (CPU time: what a disk takes beside it is the size's); reading is from"
        f" files to windows as stored. Medians of {CODEC_REPEATS}.",
        "",
        "| dtype | compression | size, x bfloat16 | write | read |",
        "|---|---|---:|---:|---:|",
    )
    for (dtype, compression), times in found.items():
        size, write, read_ = (statistics.median(column) for column in zip(*times, strict=True))
        speeds = f"{plain / write / 1e9:.2f} | {plain / read_ / 1e9:.2f}"
        yield f"| {dtype} | {compression} | {size / plain:.3f} | {speeds} |"


def loss_lines(store: ActivationStore, x: Tensor, folder: Path) -> Iterator[str]:
    """Yields the table of errors of each codec, and the FVU of an SAE that reads what it gives back."""
    sae = load_sae_folder(folder)
    kinds = torch.from_numpy(store.kinds().ravel())
    normal, massive = x[kinds == NORMAL], x[kinds == MASSIVE]
    mean = normal.double().mean(0)
    variance = (normal.double() - mean).square().sum()
    largest = int(normal.abs().mean(0).argmax())
    largest_variance = (normal[:, largest].double() - mean[largest]).square().sum()

    def fvu(given: Tensor) -> float:
        error = 0.0
        for seen, true in zip(torch.split(given, 2048), torch.split(normal, 2048), strict=True):
            with torch.no_grad():
                error += float((sae(seen).x_hat - true).double().square().sum())
        return error / float(variance)

    yield from (
        "",
        "## What codecs lose",
        "",
        f"{len(normal):,} normal and {len(massive):,} massive tokens, which the SAE does not see; FVU of the SAE in `{folder.name}` against the float32"
        " activations, from what each codec gives back. The dimension is that of the largest mean.",
        "",
        "| dtype | error / variance | of the largest dimension | relative error, massive tokens | SAE's FVU |",
        "|---|---:|---:|---:|---:|",
        f"| float32 | 0 | 0 | 0 | {fvu(normal):.5f} |",
    )
    for dtype in DTYPES:
        codec = CODECS[dtype]
        given = codec.decode(codec.encode(normal)).float()
        off = (given - normal).double().square()
        away = codec.decode(codec.encode(massive)).double() - massive.double()
        relative = float((away.square().sum() / massive.double().square().sum()).sqrt()) if len(massive) else 0.0
        yield (
            f"| {dtype} | {float(off.sum() / variance):.2e} | {float(off[:, largest].sum() / largest_variance):.2e}"
            f" | {relative:.2e} | {fvu(given):.5f} |"
        )
