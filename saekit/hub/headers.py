"""What is known of a weights file before its tensors are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["SAFETENSORS_DTYPES", "Container", "TensorHeader", "is_true", "reason"]

SAFETENSORS_DTYPES = {
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
"""What safetensors calls the dtypes that are read."""


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
        name = self.dtype
        dtype = SAFETENSORS_DTYPES.get(name) or getattr(torch, name)
        return torch.empty(self.shape, dtype=dtype, device="meta")


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
        """Returns one tensor, perhaps a view into a mapped file: copied before it is kept or changed."""
        ...


def reason(error: BaseException) -> str:
    """Returns an error's first line, or its kind where it has none; what a terminal would act on is escaped."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line if line.isprintable() else line.encode("unicode_escape").decode("ascii")


def is_true(condition: Tensor) -> bool:
    """Whether a check of weights holds; it does for those whose header alone was read."""
    return condition.is_meta or bool(condition)
