"""One released dictionary on disk: its files, its config as it stands, and its tensors, taken by name and checked."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.containers import open_container
from saekit.hub.copying import checked_copy
from saekit.hub.headers import Container, TensorHeader, reason
from saekit.hub.strict import parse_json, parse_yaml, printable

__all__ = ["Release", "Weights", "read_mapping"]

_MAX_CONFIG_BYTES = 1_000_000

_T = TypeVar("_T")


class Weights:
    """The tensors of some files, by name; each is checked when it is taken, and none may be left over.

    Attributes:
        where: names the file in messages.
        headers: name -> dtype and shape, known before any weight is read.
        values: what else the files hold.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        opener: Callable[[Path], Container] = open_container,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Opens the files and reads their headers.

        Args:
            opener: how a file is opened.
            dtype: what the dictionary will be stored in, where that is known.

        Raises:
            FormatError: a file cannot be read, or two hold a tensor of the same name.
        """
        self.headers: dict[str, TensorHeader] = {}
        self.values: dict[str, object] = {}
        self._home: dict[str, Container] = {}
        self._taken: set[str] = set()
        self._kept = dtype if dtype in {torch.bfloat16, torch.float16} else None
        names = []
        for path in paths:
            container = opener(path)
            names.append(str(path))
            twice = self._home.keys() & container.headers.keys()
            if twice:
                raise FormatError(f"{str(path)!r}: holds {printable(twice, 1)} again, needs each tensor once")
            self.headers |= container.headers
            self.values |= container.values
            self._home |= dict.fromkeys(container.headers, container)
        self.where = repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def has(self, *names: str) -> bool:
        """Whether all these tensors are there."""
        return self.headers.keys() >= set(names)

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """Returns the shape of a tensor.

        Raises:
            FormatError: it is not there, or has another number of axes.
        """
        if name not in self.headers:
            raise FormatError(f"{self.where}: has {printable(self.headers)}, needs also {name}")
        shape = self.headers[name].shape
        if len(shape) != num_dims or 0 in shape:
            raise FormatError(f"{self.where}: {name} is {list(shape)}, needs {num_dims} axes, none of them 0")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """Returns a tensor as float32 in memory of its own.

        Raises:
            FormatError: it is not there, has another shape, is not floating point, or holds NaN or Inf.
        """
        return self._take(name, shape, None)

    def matrix(self, name: str, *shape: int) -> Tensor:
        """Returns a tensor as `take` does, in half precision where the file has it in just the one that is wanted.

        For the matrices of a `Canonical`: what no fold changes is then never larger in memory than in the file.
        """
        return self._take(name, shape, self._kept)

    def _take(self, name: str, shape: tuple[int, ...], kept: torch.dtype | None) -> Tensor:
        found = self.shape(name, len(shape))
        if found != shape:
            raise FormatError(f"{self.where}: {name} is {list(found)}, needs {list(shape)}")
        header = self.headers[name]
        if not header.is_floating_point:
            raise FormatError(f"{self.where}: {name} is {header.dtype}, needs floating point")
        self._taken.add(name)
        stored = self._home[name].tensor(name)
        tensor, is_finite = checked_copy(stored, kept if stored.dtype == kept else torch.float32)
        if not is_finite:
            raise FormatError(f"{self.where}: {name} has NaN or Inf, needs finite weights")
        return tensor

    def take_if(self, name: str, *shape: int) -> Tensor | None:
        """Returns a tensor as `take` does, or None where it is not there."""
        return self.take(name, *shape) if name in self.headers else None

    def scalar(self, name: str) -> float:
        """Returns a tensor of one number.

        Raises:
            FormatError: it is not there or holds more than one number.
        """
        if name not in self.headers or self.headers[name].shape not in {(), (1,)}:
            found = list(self.headers[name].shape) if name in self.headers else "not there"
            raise FormatError(f"{self.where}: {name} is {found}, needs one number")
        self._taken.add(name)
        value = float(self._home[name].tensor(name).reshape(()))
        if value != value or value in {float("inf"), float("-inf")}:
            raise FormatError(f"{self.where}: {name} is {value}, needs a finite number")
        return value

    def has_nan(self, name: str) -> bool:
        """Whether a tensor holds NaN, by which some formats say that it is not used."""
        tensor = self._home[name].tensor(name)
        return not tensor.is_meta and bool(torch.isnan(tensor).any())

    def finish(self, *ignored: str) -> None:
        """Checks that every tensor was taken: one that nobody reads might change the function.

        Args:
            ignored: tensors that are known to be records only.

        Raises:
            FormatError: a tensor was not taken.
        """
        left = sorted(self.headers.keys() - self._taken - set(ignored))
        if left:
            raise FormatError(f"{self.where}: also holds {printable(left)}, needs only tensors that the format knows")


@dataclass(kw_only=True)
class Release:
    """The files of one dictionary and where they come from."""

    folder: Path
    """The folder of the weights, or the one above `checkpoints/`."""
    files: tuple[str, ...]
    """Weights files, relative to `folder`."""
    configs: Mapping[str, Mapping[str, object]]
    """Name -> content of the config files beside them, untouched."""
    ref: str
    """What names it in messages, and what tells layer and site where nothing else does."""
    repo: str | None = None
    """Hub repository."""
    revision: str | None = None
    """Commit of the repository."""
    opener: Callable[[Path], Container] = open_container
    """How its files are opened."""
    dtype: torch.dtype | None = None
    """What the dictionary will be stored in; None: as the reader makes it."""
    _weights: Weights | None = field(default=None, repr=False)

    @property
    def weights(self) -> Weights:
        """All weights files together, opened at first use."""
        if self._weights is None:
            self._weights = self.open(*self.files)
        return self._weights

    def open(self, *names: str) -> Weights:
        """Returns some of the weights files, opened together."""
        return Weights((self.folder / name for name in names), self.opener, self.dtype)

    @property
    def values(self) -> Mapping[str, object]:
        """What the weights files hold beside tensors; empty where they were not opened together."""
        return {} if self._weights is None else self._weights.values

    @property
    def name(self) -> str:
        """Name of the first weights file."""
        return PurePosixPath(self.files[0]).name

    @property
    def config(self) -> Mapping[str, object]:
        """The config files' keys together; empty where there is none."""
        merged: dict[str, object] = {}
        for values in self.configs.values():
            merged |= values
        return merged

    def need(self, name: str) -> Mapping[str, object]:
        """Returns one config file's content.

        Raises:
            FormatError: it is not there.
        """
        if name not in self.configs:
            raise FormatError(f"{self.ref!r}: has {sorted(self.configs) or 'no config'}, needs {name}")
        return self.configs[name]

    def get(self, key: str, kind: type[_T], *, config: Mapping[str, object] | None = None) -> _T:
        """Returns a config value of a kind; int serves for float.

        Raises:
            FormatError: it is missing, of another kind, or not finite.
        """
        values = self.config if config is None else config
        value = values.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{self.ref!r}: config: {key} is {value!r}, needs {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise FormatError(f"{self.ref!r}: config: {key} is {value!r}, needs a finite number")
        return value

    def flag(self, key: str, default: bool, *, config: Mapping[str, object] | None = None) -> bool:
        """Returns a true-or-false config value; `default` where it is missing or null."""
        values = self.config if config is None else config
        return default if values.get(key) is None else self.get(key, bool, config=values)

    def check(self, key: str, found: int, *, config: Mapping[str, object] | None = None) -> None:
        """Checks that a size in the config, where there is one, is the one of the weights.

        Raises:
            FormatError: they disagree.
        """
        values = self.config if config is None else config
        if values.get(key) is not None and self.get(key, int, config=values) != found:
            raise FormatError(f"{self.ref!r}: config: {key} is {values[key]!r}, the weights need {found}")


def read_mapping(path: Path) -> Mapping[str, object]:
    """Returns the content of a `.json` or `.yaml` file.

    Raises:
        FormatError: it cannot be read, or is not a mapping.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise ValueError(f"{size} bytes are too many")
        text = path.read_text(encoding="utf-8")
        content = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except (OSError, ValueError) as error:
        raise FormatError(f"{str(path)!r}: cannot be read: {reason(error)}, needs a config") from error
    if not isinstance(content, dict):
        raise FormatError(f"{str(path)!r}: holds a {type(content).__name__}, needs a mapping")
    return {str(key): value for key, value in content.items()}
