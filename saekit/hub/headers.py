"""What a weights file says of itself before its weights are read, from any file that can seek: a local one, or the hub's."""

import collections
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor

from saekit.errors import FormatError

__all__ = [
    "CONFIG_CLASSES",
    "InertConfig",
    "TensorHeader",
    "npz_headers",
    "safetensors_headers",
    "state_outline",
]

CONFIG_CLASSES = (
    "sae_lens.training.config.LanguageModelSAERunnerConfig",
    "sae_training.config.LanguageModelSAERunnerConfig",
)
"""Config objects that old trainers pickled beside their weights."""
_SMALL_BYTES = 256
_MAX_HEADER_BYTES = 100_000_000
# Float weights hardly compress; a file that claims more than this is made to fill the memory.
_MAX_EXPANSION = 20
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """What a file says of one tensor before it is read."""

    dtype: str
    shape: tuple[int, ...]
    is_floating_point: bool
    small: Tensor | None = None
    """The tensor itself, where it is small and the file was asked for it."""

    @property
    def outline(self) -> Tensor:
        """The tensor without its numbers, on torch's meta device; with them where they are known."""
        if self.small is not None:
            return self.small
        name = self.dtype.removeprefix("torch.")
        dtype = _SAFETENSORS_DTYPES.get(name) or getattr(torch, name)
        return torch.empty(self.shape, dtype=dtype, device="meta")


class InertConfig:
    """Takes the place of a pickled config class: keeps the attributes, runs nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


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
        entries = json.loads(text)
        headers = {}
        end = 0
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            header, (first, last) = _safetensors_header(name, entry, where)
            if with_small and first >= 0 and _is_small(_SAFETENSORS_DTYPES[header.dtype], last - first):
                file.seek(8 + length + first)
                header = _with_small(header, file.read(last - first))
            headers[name] = header
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: not a safetensors header, needs an unbroken safetensors file") from error
    if 8 + length + end != size:
        raise FormatError(f"{where}: {size} bytes, the header needs {8 + length + end}; download it again")
    return headers


def _safetensors_header(name: str, entry: Mapping[str, object], where: str) -> tuple[TensorHeader, tuple[int, int]]:
    extents, dtype, offsets = entry["shape"], str(entry["dtype"]), entry["data_offsets"]
    if not isinstance(extents, list) or not isinstance(offsets, list):
        raise TypeError("neither shape nor place")
    shape = tuple(int(extent) for extent in extents)
    first, last = offsets
    if dtype not in _SAFETENSORS_DTYPES:
        raise FormatError(f"{where}: {name} is {dtype}, needs float64, float32, float16, bfloat16 or integers")
    known = _SAFETENSORS_DTYPES[dtype]
    if min(shape, default=0) < 0 or last - first != math.prod(shape) * known.itemsize:
        raise FormatError(f"{where}: {name} {list(shape)} takes {last - first} bytes, needs as many as its shape")
    return TensorHeader(dtype=dtype, shape=shape, is_floating_point=known.is_floating_point), (first, last)


def npz_headers(file: IO[bytes], where: str, *, with_small: bool = False) -> dict[str, TensorHeader]:
    """Returns the header of every array in a `.npz` file.

    Raises:
        FormatError: the archive is broken, or holds anything but arrays of numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {
                info.filename.removesuffix(".npy"): _npz_header(archive, info, where, with_small=with_small)
                for info in archive.infolist()
            }
    except FormatError:
        raise
    except Exception as error:
        # A broken archive can raise anything, from struct to zlib.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{where}: {reason}, needs an unbroken .npz file") from error


def _npz_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str, *, with_small: bool) -> TensorHeader:
    where = f"{where}: {info.filename}"
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
        is_small = with_small and _is_small(header.outline.dtype, data)
        return _with_small(header, member.read()) if is_small else header


def _is_small(dtype: torch.dtype, num_bytes: int) -> bool:
    """Whether a tensor is a few figures, such as k or a scale, that are read with the header."""
    return num_bytes <= (dtype.itemsize if dtype.is_floating_point else _SMALL_BYTES)


def _with_small(header: TensorHeader, content: bytes) -> TensorHeader:
    if not content:
        return header
    outline = header.outline
    small = torch.frombuffer(bytearray(content), dtype=outline.dtype).reshape(outline.shape)
    return TensorHeader(dtype=header.dtype, shape=header.shape, is_floating_point=header.is_floating_point, small=small)


def state_outline(file: IO[bytes], where: str) -> object:
    """Returns what a file of torch.save holds, its tensors without their numbers but for small ones; runs nothing in it.

    Reads the directory and the pickle of an archive, or the pickles at the start of a file from before the archives.

    Raises:
        FormatError: the file is broken, or its pickle names anything but tensors, numbers, texts and known configs.
    """
    try:
        file.seek(0)
        if file.read(2) == b"PK":
            with zipfile.ZipFile(file) as archive:
                pickled = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
                if pickled.file_size > _MAX_HEADER_BYTES or pickled.compress_type != zipfile.ZIP_STORED:
                    raise FormatError(f"{where}: a pickle of {pickled.file_size} bytes, needs a plain state dict")
                folder = pickled.filename.removesuffix("data.pkl")
                with archive.open(pickled) as stream:
                    return _Outliner(stream, where, archive, f"{folder}data/").load()
        file.seek(0)
        # Three facts about the writer come before the content.
        for _ in range(3):
            _Outliner(file, where).load()
        return _Outliner(file, where).load()
    except FormatError:
        raise
    except Exception as error:
        # A broken pickle can raise anything: it is a program that was cut or changed.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{where}: {reason}, needs an unbroken file of torch.save") from error


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    content: bytes | None


class _Outliner(pickle.Unpickler):
    """Knows only the names below, each of which stands for a function of this module that keeps what it is given."""

    def __init__(self, file: IO[bytes], where: str, archive: zipfile.ZipFile | None = None, folder: str = "") -> None:
        super().__init__(file)
        self._where, self._archive, self._folder = where, archive, folder

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full in CONFIG_CLASSES:
            return InertConfig
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch.Size": tuple,
            "torch.device": torch.device,
            "torch._utils._rebuild_tensor_v2": _outlined,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        if full not in known:
            raise FormatError(f"{self._where}: pickled {full}, needs tensors, numbers and texts only")
        return known[full]

    def persistent_load(self, pid: object) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
            raise FormatError(f"{self._where}: a reference {str(pid)[:80]!r}, needs the storage of a tensor")
        is_small = self._archive is not None and _is_small(pid[1], pid[4] * pid[1].itemsize)
        content = self._archive.read(f"{self._folder}{pid[2]}") if self._archive is not None and is_small else None
        return _Storage(pid[1], content)


def _outlined(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if storage.content is None:
        return torch.empty(tuple(size), dtype=storage.dtype, device="meta")
    held = torch.frombuffer(bytearray(storage.content), dtype=storage.dtype)
    return held.as_strided(tuple(size), tuple(stride), offset)
