"""Chunks of files read and checked, and rows gathered as float32, by the compiled kernels."""

import os
from pathlib import Path

import google_crc32c
import pytest
import torch
from saekit_kernels import _build
from saekit_kernels.stored import gather_rows, read_chunks
from torch import Tensor

# About the three parts of 512 bytes that are summed beside each other, and the steps of 8.
LENGTHS = [1, 7, 8, 9, 511, 1535, 1536, 1537, 3079, 5000]
# The check value of the algorithm, as catalogues of checksums give it.
KNOWN = b"123456789", 0xE3069283


@pytest.fixture(autouse=True, params=["this machine", "portable"])
def _compiled(request: pytest.FixtureRequest, compiled_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for this processor and for any."""
    monkeypatch.delenv("SAEKIT_KERNELS", raising=False)
    if request.param == "portable":
        portable = _build._library("DEFAULT")
        monkeypatch.setattr(_build, "library", lambda: portable)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_gathered_with_the_bits_that_torch_gives_them(dtype: torch.dtype) -> None:
    """Every number of 16 bits: denormals, infinities and NaN among them; widths that no vector divides."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    rows = numbers.view(torch.bfloat16).float() if dtype == torch.float32 else numbers.view(dtype)
    for width in (64, 13, 1):
        table = rows[: len(rows) // width * width].reshape(-1, width)
        indices = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
        expected = table.index_select(0, indices).to(torch.float32)
        out = torch.zeros(len(table), width + 3)
        assert gather_rows(table, indices, out[:, 2:-1])
        assert torch.equal(bits_of(out[:, 2:-1].contiguous()), bits_of(expected))
        assert not out[:, :2].any()
        assert not out[:, -1].any()


def test_rows_that_lie_otherwise_are_left_to_the_caller() -> None:
    rows, indices = torch.ones(4, 6), torch.tensor([3, 0])
    for table in (rows.double(), rows.to(torch.int8), rows[:, ::2], rows.T):
        assert not gather_rows(table, indices, torch.empty(2, table.shape[1]))
    assert not gather_rows(rows, indices, torch.empty(6, 2).T)
    assert gather_rows(rows, indices[:0], torch.empty(0, 6))


class Files:
    """Two files of chunks, some of them neighbours, and how much is wanted of each."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = [
            bytes(torch.randint(256, (length,), generator=generator).tolist()) for length in [*LENGTHS, *LENGTHS]
        ]
        self.data[3] = KNOWN[0]
        self.paths = [folder / "a", folder / "b"]
        self.offsets: list[int] = []
        for number, path in enumerate(self.paths):
            content = bytearray(b"mark")
            for place, data in enumerate(self.data[number * len(LENGTHS) :][: len(LENGTHS)]):
                # Apart by nothing, by less than is read with them, and by more.
                content += bytes([0, 60, 100][place % 3])
                self.offsets.append(len(content))
                crc = KNOWN[1] if data == KNOWN[0] else google_crc32c.value(data)
                content += data + crc.to_bytes(4, "little")
            path.write_bytes(content)

    def read(self, *, part: float = 1, by_tables: bool = False) -> bytes | None:
        sizes = [int(len(data) * part) for data in self.data]
        out = torch.zeros(sum(sizes), dtype=torch.uint8)
        files = [os.open(path, os.O_RDONLY) for path in self.paths]
        try:
            numbers = [files[place // len(LENGTHS)] for place in range(len(sizes))]
            columns = [numbers, self.offsets, [len(data) for data in self.data], sizes]
            done = read_chunks(*(torch.tensor(column) for column in columns), out, by_tables=by_tables)
        finally:
            for file in files:
                os.close(file)
        return out.numpy().tobytes() if done else None

    def expected(self, part: float) -> bytes:
        return b"".join(data[: int(len(data) * part)] for data in self.data)


@pytest.mark.parametrize("by_tables", [False, True])
@pytest.mark.parametrize("part", [0, 0.4, 1])
def test_chunks_are_read_whole_and_in_part(part: float, by_tables: bool, tmp_path: Path) -> None:
    files = Files(tmp_path)
    assert files.read(part=part, by_tables=by_tables) == files.expected(part)


@pytest.mark.parametrize("by_tables", [False, True])
def test_each_changed_byte_is_noticed(by_tables: bool, tmp_path: Path) -> None:
    """In the part that is wanted, in the one that is not, and in the checksum."""
    files = Files(tmp_path)
    path, content = files.paths[1], files.paths[1].read_bytes()
    for place in (0, 9):
        start = files.offsets[len(LENGTHS) + place]
        length = LENGTHS[place]
        for at in {start, start + length // 2, start + length - 1, start + length, start + length + 3}:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert files.read(part=0.4, by_tables=by_tables) is None
    path.write_bytes(content[:-1])
    assert files.read() is None
    path.write_bytes(content)
    assert files.read() is not None


def test_what_cannot_be_read_is_left_to_the_caller(tmp_path: Path) -> None:
    one = torch.ones(1, dtype=torch.int64)
    assert not read_chunks(-one, one, one, one, torch.empty(1, dtype=torch.uint8))


def test_other_kernels_in_the_environment_leave_all_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", "cpu")
    assert Files(tmp_path).read() is None
    assert not gather_rows(torch.ones(2, 2), torch.tensor([0]), torch.empty(1, 2))


def test_chunks_beyond_one_call_of_the_system(tmp_path: Path) -> None:
    """More neighbours than one call takes."""
    data = [bytes([number % 256]) * 3 for number in range(1100)]
    stored = b"".join(some + google_crc32c.value(some).to_bytes(4, "little") for some in data)
    path = tmp_path / "many"
    path.write_bytes(stored)
    file = os.open(path, os.O_RDONLY)
    each = torch.ones(1100, dtype=torch.int64)
    out = torch.zeros(2200, dtype=torch.uint8)
    done = read_chunks(each * file, torch.arange(1100) * 7, each * 3, each * 2, out)
    os.close(file)
    assert done
    assert out.numpy().tobytes() == b"".join(some[:2] for some in data)
