"""The small arrays of a cache (token rows, kinds, norms) as plain zarr v3."""

import errno
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zarr

from saekit.activations.codec import AnyArray
from saekit.activations.layout import ShardRecord, shard_name
from saekit.errors import ResourceError, StoreError

__all__ = ["read_arrays", "read_norms", "write_arrays"]

# Large enough that files stay few, small enough for other readers of the format, which load whole chunks.
_CHUNK_BYTES = 16 * 2**20


def write_arrays(path: Path, arrays: dict[str, AnyArray]) -> None:
    """Writes a zarr group of arrays.

    Raises:
        OSError: as the file system says it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="zarr")
        group = zarr.open_group(path, mode="w-", zarr_format=3)
        for name, array in arrays.items():
            row_bytes = int(np.prod(array.shape[1:])) * array.itemsize
            rows = max(1, min(array.shape[0], _CHUNK_BYTES // max(1, row_bytes)))
            target = group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(rows, *array.shape[1:]))
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


def read_norms(folder: Path, shards: Sequence[ShardRecord]) -> npt.NDArray[np.float32]:
    """Returns the norm of each activation of a hook point, `[R, T]` over the rows of the shards.

    Args:
        folder: of the hook point.
        shards: in order.

    Raises:
        StoreError: one cannot be read.
    """
    norms = [read_arrays(folder / shard_name(shard.span.index), "norm")[0] for shard in shards]
    return np.concatenate(norms, dtype=np.float32)
