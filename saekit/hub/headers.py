"""What is known of a weights file before its tensors are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Container", "TensorHeader", "reason"]


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


def reason(error: BaseException) -> str:
    """Returns an error's first line, or its kind where it has none; what a terminal would act on is escaped."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line if line.isprintable() else line.encode("unicode_escape").decode("ascii")
