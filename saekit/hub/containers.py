"""The files that hold released weights, opened so that nothing in them can run: headers first, tensors one at a time."""

import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.headers import Container, TensorHeader, reason
from saekit.hub.pickles import open_pickle
from saekit.hub.strict import parse_json

__all__ = ["open_container"]

# A thousand times what a release of many layers needs; parsed, a header takes many times its size.
_MAX_HEADER_BYTES = 20_000_000
# Float weights hardly compress; a file that claims more than this is made to fill the memory.
_MAX_EXPANSION = 20
_SAFETENSORS_DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def open_container(path: Path) -> Container:
    """Opens a `.safetensors`, `.npz`, `.pt` or `.pth` file and reads its header.

    Raises:
        FormatError: another kind of file, one that is cut off, or one that would run code or fill the memory.
    """
    if not path.is_file():
        raise FormatError(f"{str(path)!r}: no such file, needs the weights of a dictionary")
    match path.suffix:
        case ".safetensors":
            return _Safetensors(path)
        case ".npz":
            return _Npz(path)
        case ".pt" | ".pth":
            return open_pickle(path)
        case _:
            raise FormatError(
                f"{str(path)!r}: a {path.suffix or 'nameless'} file, needs .safetensors, .npz, .pt or .pth"
            )


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: Mapping[str, object] = {}
        self.headers: Mapping[str, TensorHeader] = _safetensors_headers(path)

    def tensor(self, name: str) -> Tensor:
        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{str(self._path)!r}: {name}: {error}, needs an unbroken safetensors file") from error
        return tensor


def _safetensors_headers(path: Path) -> dict[str, TensorHeader]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise FormatError(
                f"{str(path)!r}: {size} bytes, needs a safetensors header and its data; download it again"
            )
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
            shape = tuple(int(extent) for extent in entry["shape"])
            dtype = str(entry["dtype"])
            first, last = entry["data_offsets"]
            if dtype not in _SAFETENSORS_DTYPES:
                raise FormatError(
                    f"{str(path)!r}: {name!r} is {dtype!r}, needs float64, float32, float16, bfloat16 or integers"
                )
            if min(shape, default=0) < 0 or last - first != math.prod(shape) * _SAFETENSORS_DTYPES[dtype]:
                raise FormatError(
                    f"{str(path)!r}: {name!r} {list(shape)} takes {last - first} bytes, needs as many as its shape"
                )
            headers[name] = TensorHeader(
                dtype=dtype, shape=shape, is_floating_point=dtype[0] in "FB" and dtype != "BOOL"
            )
            end = max(end, last)
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        twice = f" ({error})" if str(error).endswith("twice") else ""
        raise FormatError(
            f"{str(path)!r}: not a safetensors header{twice}, needs an unbroken safetensors file"
        ) from error
    if 8 + length + end != size:
        raise FormatError(f"{str(path)!r}: {size} bytes, the header needs {8 + length + end}; download it again")
    return headers


class _Npz:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: Mapping[str, object] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                self.headers: Mapping[str, TensorHeader] = {
                    info.filename.removesuffix(".npy"): self._header(archive, info) for info in members
                }
            if len(self.headers) < len(members):
                raise FormatError(f"{str(path)!r}: {len(members)} arrays, {len(self.headers)} names; needs each once")
        except FormatError:
            raise
        except Exception as error:
            # A broken archive can raise anything, from struct to zlib.
            raise FormatError(f"{str(path)!r}: {reason(error)}, needs an unbroken .npz file") from error

    def tensor(self, name: str) -> Tensor:
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays[name])
        except Exception as error:
            raise FormatError(f"{str(self._path)!r}: {name!r}: {reason(error)}, needs an unbroken .npz file") from error

    def _header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> TensorHeader:
        where = f"{str(self._path)!r}: {info.filename!r}"
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
        return TensorHeader(dtype=str(dtype), shape=tuple(shape), is_floating_point=dtype.kind == "f")
