"""Headers of safetensors and npz files, from any file that can seek: a local one, or the hub's."""

import math
import struct
import zipfile
from collections.abc import Mapping
from typing import IO

import numpy as np
import torch

from saekit.errors import FormatError
from saekit.hub.headers import SAFETENSORS_DTYPES, TensorHeader, reason
from saekit.hub.strict import parse_json

__all__ = ["is_small", "npz_headers", "safetensors_headers"]

_SMALL_BYTES = 256
# A thousand times what a release of many layers needs; parsed, a header takes many times its size.
_MAX_HEADER_BYTES = 20_000_000
# Float weights hardly compress; a file that claims more than this is made to fill the memory.
_MAX_EXPANSION = 20


def safetensors_headers(file: IO[bytes], size: int, where: str, *, with_small: bool = False) -> dict[str, TensorHeader]:
    """Returns the header of a safetensors file.

    Args:
        file: at its start.
        size: bytes of the whole file.
        where: names the file in messages.
        with_small: whether to read tensors of a few numbers.

    Raises:
        FormatError: the file is cut off, or is none.
    """
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise FormatError(f"{where}: {size} bytes, needs a safetensors header and its data; download it again")
    text = file.read(length)
    try:
        entries = parse_json(text)
        if not isinstance(entries, dict):
            raise TypeError
        headers = {}
        end = 0
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            header, (first, last) = _safetensors_header(name, entry, where)
            if with_small and first >= 0 and is_small(SAFETENSORS_DTYPES[header.dtype], last - first):
                file.seek(8 + length + first)
                header = _with_small(header, file.read(last - first))
            headers[name] = header
            end = max(end, last)
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        twice = f" ({error})" if str(error).endswith("twice") else ""
        raise FormatError(f"{where}: not a safetensors header{twice}, needs an unbroken safetensors file") from error
    if 8 + length + end != size:
        raise FormatError(f"{where}: {size} bytes, the header needs {8 + length + end}; download it again")
    return headers


def _safetensors_header(name: str, entry: Mapping[str, object], where: str) -> tuple[TensorHeader, tuple[int, int]]:
    extents, dtype, offsets = entry["shape"], str(entry["dtype"]), entry["data_offsets"]
    if not isinstance(extents, list) or not isinstance(offsets, list):
        raise TypeError("neither shape nor place")
    shape = tuple(int(extent) for extent in extents)
    first, last = offsets
    if dtype not in SAFETENSORS_DTYPES:
        raise FormatError(f"{where}: {name!r} is {dtype!r}, needs float64, float32, float16, bfloat16 or integers")
    known = SAFETENSORS_DTYPES[dtype]
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * known.itemsize:
        raise FormatError(f"{where}: {name!r} {list(shape)} takes {last - first} bytes, needs as many as its shape")
    return TensorHeader(dtype=dtype, shape=shape, is_floating_point=known.is_floating_point), (first, last)


def npz_headers(file: IO[bytes], where: str, *, with_small: bool = False) -> dict[str, TensorHeader]:
    """Returns the header of every array in a `.npz` file.

    Raises:
        FormatError: the archive is broken, or holds anything but arrays of numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            headers = {
                info.filename.removesuffix(".npy"): _npz_header(archive, info, where, with_small=with_small)
                for info in members
            }
        if len(headers) < len(members):
            raise FormatError(f"{where}: {len(members)} arrays, {len(headers)} names; needs each once")
        return headers
    except FormatError:
        raise
    except Exception as error:
        # A broken archive can raise anything, from struct to zlib.
        raise FormatError(f"{where}: {reason(error)}, needs an unbroken .npz file") from error


def _npz_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str, *, with_small: bool) -> TensorHeader:
    where = f"{where}: {info.filename!r}"
    if info.file_size > _MAX_EXPANSION * max(info.compress_size, 1):
        raise FormatError(f"{where} grows from {info.compress_size} to {info.file_size} bytes, needs real weights")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        data = info.file_size - member.tell()
        if dtype.hasobject or dtype.kind not in "fiub":
            raise FormatError(f"{where} holds {dtype}, needs numbers; arrays of objects can run code and are not read")
        if data != math.prod(shape) * dtype.itemsize:
            raise FormatError(f"{where} {list(shape)} takes {data} bytes, needs {math.prod(shape) * dtype.itemsize}")
        header = TensorHeader(dtype=str(dtype), shape=tuple(shape), is_floating_point=dtype.kind == "f")
        has_small = with_small and is_small(header.outline.dtype, data)
        return _with_small(header, member.read()) if has_small else header


def is_small(dtype: torch.dtype, num_bytes: int) -> bool:
    """Whether a tensor is a few figures, such as k or a scale, that are read with the header."""
    return num_bytes <= (dtype.itemsize if dtype.is_floating_point else _SMALL_BYTES)


def _with_small(header: TensorHeader, content: bytes) -> TensorHeader:
    if not content:
        return header
    outline = header.outline
    small = torch.frombuffer(bytearray(content), dtype=outline.dtype).reshape(outline.shape)
    return TensorHeader(dtype=header.dtype, shape=header.shape, is_floating_point=header.is_floating_point, small=small)
