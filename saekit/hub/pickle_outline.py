"""What a file of torch.save holds without its tensors' numbers: the pickle is read by names that stand for nothing else."""

import collections
import pickle
import zipfile
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.array_headers import is_small
from saekit.hub.headers import reason
from saekit.hub.pickles import CONFIG_CLASSES, InertConfig
from saekit.hub.strict import printable

__all__ = ["state_outline"]

_MAX_PICKLE_BYTES = 20_000_000
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
                if pickled.file_size > _MAX_PICKLE_BYTES or pickled.compress_type != zipfile.ZIP_STORED:
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
        raise FormatError(f"{where}: {reason(error)}, needs an unbroken file of torch.save") from error


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
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
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
            raise FormatError(f"{self._where}: pickled {printable([full])}, needs tensors, numbers and texts only")
        return known[full]

    def persistent_load(self, pid: object) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
            raise FormatError(f"{self._where}: a reference {str(pid)[:80]!r}, needs the storage of a tensor")
        has_small = self._archive is not None and is_small(pid[1], pid[4] * pid[1].itemsize)
        content = self._archive.read(f"{self._folder}{pid[2]}") if self._archive is not None and has_small else None
        return _Storage(pid[1], content)


def _outlined(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    if storage.content is None:
        return torch.empty(tuple(size), dtype=storage.dtype, device="meta")
    held = torch.frombuffer(bytearray(storage.content), dtype=storage.dtype)
    return held.as_strided(tuple(size), tuple(stride), offset)
