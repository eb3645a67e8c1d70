"""How activations lie on disk: zarr v3 arrays in plain chunks, whose files are mapped into memory for reading.

Chunks are not compressed. Measured on SmolLM2-135M layer 15 (37 MB of bfloat16, one core of a 2.5 GHz Xeon): zstd saves
20 % and decodes at 1.3 GB/s, lz4 with bit shuffling saves 15 % at 2.3 GB/s; plain chunks map at 8 GB/s, and a random token
costs its own bytes instead of its chunk's: 4,096 random tokens in 1.2 ms mapped, 64 ms and more through any codec.
A trainer at 1M tokens/s asks for 1 to 8 GB/s.
"""

import errno
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from saekit.errors import ResourceError, StoreError

__all__ = [
    "ITEM_BYTES",
    "TORCH_DTYPES",
    "Chunks",
    "StoredDtype",
    "chunk_rows",
    "numpy_dtype",
    "read_arrays",
    "to_numpy",
    "to_torch",
    "write_arrays",
]

StoredDtype = Literal["bfloat16", "float16", "float32"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

# numpy and zarr 3.1 have no bfloat16 of their own: its bits are stored as uint16 under an attribute that says so.
_NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}

# Large enough that files stay few (230 GB: 14,000), small enough for other readers of the format, which load whole chunks.
_CHUNK_BYTES = 16 * 2**20

AnyArray = npt.NDArray[np.generic]


def numpy_dtype(dtype: str) -> np.dtype[np.generic]:
    """Returns the numpy dtype that a stored dtype lies in."""
    return _NUMPY_DTYPES[dtype]


def to_numpy(stored: Tensor) -> AnyArray:
    """Returns a CPU tensor as the array that is stored for it; no copy."""
    bits = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
    array: AnyArray = bits.numpy()
    return array


def to_torch(array: AnyArray, dtype: str) -> Tensor:
    """Returns a stored array as a tensor of its dtype; no copy."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def write_arrays(path: Path, arrays: dict[str, AnyArray], *, plain: dict[str, str] | None = None) -> None:
    """Writes a zarr group of arrays.

    Args:
        plain: name -> dtype of those arrays that are written without compression, to be mapped by `Chunks`.

    Raises:
        OSError: as the file system says it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="zarr")
        group = zarr.open_group(path, mode="w-", zarr_format=3)
        for name, array in arrays.items():
            if plain is not None and name in plain:
                target = group.create_array(
                    name,
                    shape=array.shape,
                    dtype=array.dtype,
                    chunks=(chunk_rows(array.shape, array.itemsize), *array.shape[1:]),
                    compressors=None,
                    attributes={"dtype": plain[name]},
                    # A chunk of zeros must be a file as well: the mapping knows no fill value.
                    config={"write_empty_chunks": True},
                )
            else:
                chunks = (chunk_rows(array.shape, array.itemsize), *array.shape[1:])
                target = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks)
            target[...] = array


def read_arrays(path: Path, *names: str) -> list[AnyArray]:
    """Returns arrays of a zarr group.

    Raises:
        StoreError: the group or an array cannot be read.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        return [np.asarray(group[name][...]) for name in names]  # type: ignore[index]  # arrays, never groups
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            raise ResourceError(f"{str(path)!r}: too many open files, needs a higher 'ulimit -n'") from error
        raise StoreError(f"{str(path)!r}: cannot be read: {error}; verify the cache") from error


def chunk_rows(shape: tuple[int, ...], item_bytes: int) -> int:
    """Returns how many rows of an array of `shape` make a chunk."""
    row_bytes = int(np.prod(shape[1:])) * item_bytes
    return max(1, min(shape[0], _CHUNK_BYTES // max(1, row_bytes)))


class Chunks:
    """Reads the plain array of one shard by mapping its chunk files."""

    def __init__(self, path: Path, *, chunk_shape: tuple[int, int, int], dtype: str) -> None:
        """Touches no file.

        Args:
            path: of the zarr array.
            chunk_shape: rows of a chunk, positions, width.
        """
        self._path = path
        self._shape = chunk_shape
        self._chunk_rows = chunk_shape[0]
        self._dtype = _NUMPY_DTYPES[dtype]
        self._maps: dict[int, AnyArray] = {}

    def rows(self, rows: npt.NDArray[np.int64], out: AnyArray) -> None:
        """Copies `[n]` rows of the shard (ascending) into `out` `[n, T, D]`."""
        for chunk, part in _groups(rows // self._chunk_rows):
            out[part] = self._mapped(chunk)[_index(rows[part] % self._chunk_rows)]

    def tokens(self, flat: npt.NDArray[np.int64], out: AnyArray) -> None:
        """Copies `[n]` tokens of the shard (`row * T + position`, ascending) into `out` `[n, D]`."""
        chunk_tokens = self._chunk_rows * self._shape[1]
        for chunk, part in _groups(flat // chunk_tokens):
            mapped = self._mapped(chunk)
            out[part] = mapped.reshape(-1, mapped.shape[-1])[_index(flat[part] % chunk_tokens)]

    def _mapped(self, chunk: int) -> AnyArray:
        mapped = self._maps.get(chunk)
        if mapped is None:
            path = self._path / "c" / str(chunk) / "0" / "0"
            try:
                mapped = np.memmap(path, dtype=self._dtype, mode="r", shape=self._shape)
            except (OSError, ValueError) as error:
                raise StoreError(f"{str(path)!r}: cannot be read: {error}; verify the cache") from error
            self._maps[chunk] = mapped
        return mapped


def _groups(keys: npt.NDArray[np.int64]) -> list[tuple[int, slice]]:
    """Returns the runs of equal values in an ascending array."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    ends = np.append(starts[1:], len(keys))
    return [(int(keys[start]), slice(int(start), int(end))) for start, end in zip(starts, ends, strict=True)]


def _index(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | slice:
    """Returns a slice where places are consecutive: it copies at the speed of memory."""
    if len(places) and places[-1] - places[0] == len(places) - 1:
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
