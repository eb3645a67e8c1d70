"""The files that hold released weights, opened so that nothing in them can run: headers first, tensors one at a time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.array_headers import npz_headers, safetensors_headers
from saekit.hub.headers import Container, TensorHeader, reason
from saekit.hub.pickles import open_pickle

__all__ = ["open_container"]


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
            raise FormatError(f"{str(self._path)!r}: {name!r}: {reason(error)}, needs an unbroken .npz file") from error
