"""The bench of the store: what is written is what is read, in order or mixed, and the tables hold a row for each."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.bench_store_tables import Times, read_lines, write_lines
from scripts.bench_store_worker import IMPLEMENTATIONS, SHARD_ROWS, answer

# Four batches; numbers that bfloat16 and a scale a token hold.
NUM_TOKENS = 16_384


@pytest.fixture(scope="module")
def x() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """`[16384, 3]`: two numbers that say which sequence a token is of, and one that is the largest of each."""
    rows = np.arange(NUM_TOKENS) // 128
    return np.stack([rows // 128, rows % 128, np.full(NUM_TOKENS, 127)], axis=1).astype(np.float32)


@pytest.mark.parametrize("name", ["numpy.memmap", "saekit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_batches_are_what_was_written(
    name: str, dtype: str, x: np.ndarray[tuple[int, int], np.dtype[np.float32]], tmp_path: Path
) -> None:
    implementation = IMPLEMENTATIONS[name][0](x)
    settings = {"dtype": dtype, "compression": "none"}
    written = answer(implementation, {"do": "write", "folder": str(tmp_path), "settings": settings})
    assert written["bytes"] >= NUM_TOKENS * 3
    for how in ("batches", "once"):
        given = torch.cat([batch.clone() for batch in implementation.read(tmp_path, how)])
        assert torch.equal(given.sort(0).values, torch.from_numpy(x).sort(0).values)
        assert torch.equal(given, torch.from_numpy(x)) == (name == "numpy.memmap")
    asked = {"do": "read", "folder": str(tmp_path), "how": "batches", "drop": True, "marked": True}
    read = answer(implementation, asked)
    assert read["tokens"] == NUM_TOKENS
    assert (read["sequences"] == 32) == (name == "numpy.memmap")


def test_zarr_reads_the_same_chunks(x: np.ndarray[tuple[int, int], np.dtype[np.float32]], tmp_path: Path) -> None:
    own = IMPLEMENTATIONS["saekit"][0](x)
    own.prepare({"dtype": "bfloat16", "compression": "none"})
    own.write(tmp_path)
    chunks = list(own.read(tmp_path, "chunks"))
    theirs = list(IMPLEMENTATIONS["zarr"][0](x).read(tmp_path, "chunks"))
    assert len(theirs) == len(chunks) // 8 > SHARD_ROWS // 128
    for chunk, other in zip(chunks, theirs, strict=False):
        assert torch.equal(chunk, other)


def test_tables_have_ratios_of_the_same_round() -> None:
    base, other = Times(), Times()
    for seconds in (1.0, 2.0):
        base.add({"seconds": seconds, "cpu_seconds": seconds}, 100)
        other.add({"seconds": 2 * seconds, "cpu_seconds": 4 * seconds}, 100)
    rows = {"numpy.memmap, bfloat16": base, "ours": other}
    assert list(write_lines(rows, 100))[-1].split(" | ")[3] == "0.50 (0.50 - 0.50)"
    mixed = list(read_lines({"batches": rows}, {"ours": 7.0}, 9.0, 2))[-1]
    assert "0.50 (0.50 - 0.50) | 0.25 | 7 of 9" in mixed
