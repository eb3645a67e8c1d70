"""The files that hold released weights, opened so that nothing in them can run: headers first, tensors one at a time."""

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
from saekit.hub.headers import CONFIG_CLASSES, InertConfig, TensorHeader, npz_headers, safetensors_headers

__all__ = ["Container", "TensorHeader", "open_container", "state_container"]

_ARCHIVE_START = b"PK\x03\x04"
# Pickle protocol 2, by which every file of torch.save before the archives begins.
_LEGACY_START = b"\x80\x02"


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
            return state_container(path, _load_pickle(path))
        case _:
            raise FormatError(
                f"{str(path)!r}: a {path.suffix or 'nameless'} file, needs .safetensors, .npz, .pt or .pth"
            )


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: Mapping[str, object] = {}
        with path.open("rb") as file:
            self.headers: Mapping[str, TensorHeader] = safetensors_headers(file, path.stat().st_size, repr(str(path)))

    def tensor(self, name: str) -> Tensor:
        try:
            with safe_open(self._path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{str(self._path)!r}: {name}: {error}, needs an unbroken safetensors file") from error
        return tensor


class _Npz:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: Mapping[str, object] = {}
        with path.open("rb") as file:
            self.headers: Mapping[str, TensorHeader] = npz_headers(file, repr(str(path)))

    def tensor(self, name: str) -> Tensor:
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays[name])
        except Exception as error:
            raise FormatError(f"{str(self._path)!r}: {name}: {_reason(error)}, needs an unbroken .npz file") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pickle:
    path: Path
    tensors: Mapping[str, Tensor]
    headers: Mapping[str, TensorHeader] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].clone()


def state_container(path: Path, content: object) -> Container:
    """Returns what a pickle held as a container: the state dict's tensors, and the numbers and texts beside them.

    Raises:
        FormatError: it is not a state dict of plain tensors, alone or under `state_dict` or `sae`.
    """
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
    if isinstance(values.get("cfg"), InertConfig):
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
    stubs = [(InertConfig, name) for name in CONFIG_CLASSES]
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
    foreign = sorted(set(names) - set(CONFIG_CLASSES))
    return f"pickled {', '.join(foreign)}" if foreign else "a pickle that is not a plain state dict"


def _check_storage(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise FormatError(f"{str(path)!r}: {name} is {tensor.layout} {tensor.dtype}, needs a plain dense tensor")
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise FormatError(f"{str(path)!r}: {name} {list(tensor.shape)} needs {claimed} bytes, the file holds {stored}")
