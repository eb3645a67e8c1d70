"""The files that hold released weights, opened so that nothing in them can run: headers first, tensors one at a time."""

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saekit.errors import FormatError

__all__ = ["Container", "TensorHeader", "open_container"]

_MAX_HEADER_BYTES = 100_000_000
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
_ARCHIVE_START = b"PK\x03\x04"
# Pickle protocol 2, by which every file of torch.save before the archives begins.
_LEGACY_START = b"\x80\x02"
# Config objects that old trainers pickled beside their weights.
_CONFIG_CLASSES = (
    "sae_lens.training.config.LanguageModelSAERunnerConfig",
    "sae_training.config.LanguageModelSAERunnerConfig",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """What a file says of one tensor before it is read."""

    dtype: str
    shape: tuple[int, ...]
    is_floating_point: bool


class Container(Protocol):
    """An open weights file."""

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Name -> dtype and shape of every tensor."""
        ...

    @property
    def values(self) -> Mapping[str, object]:
        """What else the file holds by name: numbers, texts, a pickled config's attributes under `cfg`."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Returns one tensor in memory of its own."""
        ...


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
            return _open_pickle(path)
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
        entries = json.loads(text)
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
                    f"{str(path)!r}: {name} is {dtype}, needs float64, float32, float16, bfloat16 or integers"
                )
            if min(shape, default=0) < 0 or last - first != math.prod(shape) * _SAFETENSORS_DTYPES[dtype]:
                raise FormatError(
                    f"{str(path)!r}: {name} {list(shape)} takes {last - first} bytes, needs as many as its shape"
                )
            headers[name] = TensorHeader(
                dtype=dtype, shape=shape, is_floating_point=dtype[0] in "FB" and dtype != "BOOL"
            )
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{str(path)!r}: not a safetensors header, needs an unbroken safetensors file") from error
    if 8 + length + end != size:
        raise FormatError(f"{str(path)!r}: {size} bytes, the header needs {8 + length + end}; download it again")
    return headers


class _Npz:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: Mapping[str, object] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                self.headers: Mapping[str, TensorHeader] = {
                    info.filename.removesuffix(".npy"): self._header(archive, info) for info in archive.infolist()
                }
        except FormatError:
            raise
        except Exception as error:
            # A broken archive can raise anything, from struct to zlib.
            raise FormatError(f"{str(path)!r}: {_reason(error)}, needs an unbroken .npz file") from error

    def tensor(self, name: str) -> Tensor:
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays[name])
        except Exception as error:
            raise FormatError(f"{str(self._path)!r}: {name}: {_reason(error)}, needs an unbroken .npz file") from error

    def _header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> TensorHeader:
        where = f"{str(self._path)!r}: {info.filename}"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pickle:
    path: Path
    tensors: Mapping[str, Tensor]
    headers: Mapping[str, TensorHeader] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].clone()


class _InertConfig:
    """Takes the place of a pickled config class: keeps the attributes, runs nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _open_pickle(path: Path) -> _Pickle:
    content = _load_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        inner, outer = content["state_dict"], {key: value for key, value in content.items() if key != "state_dict"}
    elif isinstance(content, dict) and isinstance(content.get("sae"), dict):
        inner, outer = content["sae"], {key: value for key, value in content.items() if key != "sae"}
    else:
        inner, outer = content, {}
    if not isinstance(inner, dict):
        raise FormatError(f"{str(path)!r}: holds a {type(content).__name__}, needs a state dict")
    named = {str(key).removeprefix("_orig_mod."): value for key, value in inner.items()}
    tensors = {key: value.detach() for key, value in named.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in named.items() if not isinstance(value, Tensor)} | outer
    if isinstance(values.get("cfg"), _InertConfig):
        values["cfg"] = {key: value for key, value in vars(values["cfg"]).items() if not key.startswith("_")}
    for name, tensor in tensors.items():
        _check_storage(path, name, tensor)
    headers = {
        name: TensorHeader(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            is_floating_point=tensor.is_floating_point(),
        )
        for name, tensor in tensors.items()
    }
    return _Pickle(path=path, tensors=tensors, headers=headers, values=values)


def _load_pickle(path: Path) -> object:
    is_zip = _starts_with(path, _ARCHIVE_START)
    if is_zip:
        packed = _compressed_member(path)
        if packed is not None:
            raise FormatError(f"{str(path)!r}: {packed} is compressed, needs a file as torch.save writes it")
    elif not _starts_with(path, _LEGACY_START):
        raise FormatError(
            f"{str(path)!r}: neither an archive nor an old file of torch.save, needs an unbroken one of them"
        )
    stubs = [(_InertConfig, name) for name in _CONFIG_CLASSES]
    try:
        with torch.serialization.safe_globals(stubs):  # type: ignore[arg-type]  # (class, name) pairs are its documented form
            # Mapped, so that only the tensors that a reader takes are read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise FormatError(f"{str(path)!r}: {_refused(path)}, needs tensors, numbers and texts only") from error
    except Exception as error:
        # A broken pickle can raise anything: it is a program that was cut or changed.
        raise FormatError(f"{str(path)!r}: {_reason(error)}, needs an unbroken file of torch.save") from error


def _compressed_member(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise FormatError(f"{str(path)!r}: {_reason(error)}, needs an unbroken file of torch.save") from error
    return next((info.filename for info in members if info.compress_type != zipfile.ZIP_STORED), None)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _refused(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        # It reads the same broken or foreign pickle again.
        names = []
    foreign = sorted(set(names) - set(_CONFIG_CLASSES))
    return f"pickled {', '.join(foreign)}" if foreign else "a pickle that is not a plain state dict"


def _check_storage(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise FormatError(f"{str(path)!r}: {name} is {tensor.layout} {tensor.dtype}, needs a plain dense tensor")
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise FormatError(f"{str(path)!r}: {name} {list(tensor.shape)} needs {claimed} bytes, the file holds {stored}")
