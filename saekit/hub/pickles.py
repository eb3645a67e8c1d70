"""Files of torch.save, read as tensors, numbers and texts: nothing that a pickle names is run."""

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.headers import Container, TensorHeader, reason
from saekit.hub.strict import printable

__all__ = ["CONFIG_CLASSES", "InertConfig", "open_pickle", "state_container"]

_ARCHIVE_START = b"PK\x03\x04"
# Pickle protocol 2, by which every file of torch.save before the archives begins.
_LEGACY_START = b"\x80\x02"
# Magic number, version, machine, the content, and the names of the storages that follow it.
_LEGACY_PICKLES = 5
# What a state dict is made of: tensors and their storages, dtypes, and mappings.
_PLAIN = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.(storage\.)?\w+Storage|torch\.(device|Size)|"
    r"torch\.(b?float\d+\w*|u?int\d+|double|half|bool|long|short)|torch\.nn\.parameter\.Parameter|"
    r"collections\.OrderedDict|builtins\.set"
)
CONFIG_CLASSES = (
    "sae_lens.training.config.LanguageModelSAERunnerConfig",
    "sae_training.config.LanguageModelSAERunnerConfig",
)
"""Config objects that old trainers pickled beside their weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pickle:
    path: Path
    tensors: Mapping[str, Tensor]
    headers: Mapping[str, TensorHeader] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


class InertConfig:
    """Takes the place of a pickled config class: keeps the attributes, runs nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def open_pickle(path: Path) -> Container:
    """Opens a file of torch.save and reads what is in it, but for the tensors' numbers.

    Raises:
        FormatError: not such a file, one that is cut off, or one that would run code or fill the memory.
    """
    return state_container(path, _load_pickle(path))


def state_container(path: Path, content: object, *, is_outline: bool = False) -> Container:
    """Returns what a pickle held as a container: the state dict's tensors, and the numbers and texts beside them.

    Args:
        path: names the file in messages.
        is_outline: whether the tensors are without their numbers, on torch's meta device.

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
    if len(named) < len(inner):
        raise FormatError(f"{str(path)!r}: {len(inner)} entries, {len(named)} names; needs each once")
    tensors = {key: value.detach() for key, value in named.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in named.items() if not isinstance(value, Tensor)} | outer
    if isinstance(values.get("cfg"), InertConfig):
        values["cfg"] = {key: value for key, value in vars(values["cfg"]).items() if not str(key).startswith("_")}
    for name, tensor in tensors.items():
        if not is_outline:
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
            raise FormatError(f"{str(path)!r}: {packed!r} is compressed, needs a file as torch.save writes it")
    elif not _starts_with(path, _LEGACY_START):
        raise FormatError(
            f"{str(path)!r}: neither an archive nor an old file of torch.save, needs an unbroken one of them"
        )
    stubs = [(InertConfig, name) for name in CONFIG_CLASSES]
    try:
        _check_names(path, is_zip)
        with torch.serialization.safe_globals(stubs):  # type: ignore[arg-type]  # (class, name) pairs are its documented form
            # Mapped, so that only the tensors that a reader takes are read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FormatError:
        raise
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{str(path)!r}: a pickle that is not a plain state dict, needs tensors, numbers and texts only"
        ) from error
    except Exception as error:
        # A broken pickle can raise anything: it is a program that was cut or changed.
        raise FormatError(f"{str(path)!r}: {reason(error)}, needs an unbroken file of torch.save") from error


def _compressed_member(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise FormatError(f"{str(path)!r}: {reason(error)}, needs an unbroken file of torch.save") from error
    return next((info.filename for info in members if info.compress_type != zipfile.ZIP_STORED), None)


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _check_names(path: Path, is_zip: bool) -> None:
    """Checks every class and function that a pickle names, before anything of it is made.

    torch's own list for `weights_only` holds some that a state dict has no use for, `bytearray` among them: with a number in
    hand it fills the memory.
    """
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            (member,) = (info for info in archive.infolist() if PurePosixPath(info.filename).name == "data.pkl")
            names = _named(archive.read(member), 1)
    else:
        with path.open("rb") as file:
            names = _named(file, _LEGACY_PICKLES)
    foreign = {name for name in names if not _PLAIN.fullmatch(name) and name not in CONFIG_CLASSES}
    if foreign:
        raise FormatError(f"{str(path)!r}: pickled {printable(foreign)}, needs tensors, numbers and texts only")


def _named(content: bytes | IO[bytes], num_pickles: int) -> set[str]:
    names = set()
    for _ in range(num_pickles):
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in {"GLOBAL", "INST"}:
                module, _, name = str(argument).partition(" ")
                names.add(f"{'builtins' if module == '__builtin__' else module}.{name}")
            elif opcode.name in {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}:
                names.add(f"by {opcode.name}")
    return names


def _check_storage(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise FormatError(f"{str(path)!r}: {name!r} is {tensor.layout} {tensor.dtype}, needs a plain dense tensor")
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise FormatError(
            f"{str(path)!r}: {name!r} {list(tensor.shape)} needs {claimed} bytes, the file holds {stored}"
        )
