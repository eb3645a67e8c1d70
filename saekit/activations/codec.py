"""What one activation is on disk: its own numbers, or eight bits a number with a scale of its own.

A quantised activation is a row of d_in + 4 bytes: d_in codes, then the scale as a little-endian float32, so that one read and
one checksum cover both. The scale is that of the largest number of the same token: a massive activation costs no other token
precision. Within a token, int8 has even steps of 1/127 of the largest number: beside one large dimension the small ones are
rounded to few steps, or to zero. float8 (e4m3: 3 bits of mantissa) has steps of at most 1/16 of each number itself down to
1/28,672 of the largest, so that dimensions beside an outlier keep their own precision. benchmarks/store_cpu.md has both beside what
they do to the FVU of trained SAEs.

Source: OCP 8-bit Floating Point Specification (OFP8) 1.0, 2023, section 5.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CODECS", "AnyArray", "Codec", "StoredDtype", "token_bytes"]

StoredDtype = Literal["bfloat16", "float16", "float32", "int8", "float8_e4m3"]

AnyArray = npt.NDArray[np.generic]

_SCALE_BYTES = 4
_LARGEST = {"int8": 127.0, "float8_e4m3": 448.0}
# An activation of zeros has a scale too.
_SMALLEST_SCALE = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """One form of stored activations."""

    name: StoredDtype
    """As in a cache's config."""
    array: np.dtype[np.generic]
    """Of the stored array. numpy and zarr 3.1 have no bfloat16 of their own: its bits are stored as uint16."""
    tensor: torch.dtype
    """Of the same bits as a tensor."""

    @property
    def is_quantised(self) -> bool:
        """Whether numbers are rounded to eight bits."""
        return self.name in _LARGEST

    def width(self, d_in: int) -> int:
        """Returns how many stored numbers an activation of `d_in` has."""
        return d_in + _SCALE_BYTES if self.is_quantised else d_in

    def encode(self, values: Tensor) -> Tensor:
        """Returns `[.., D]` as it is stored, `[.., width(D)]`, on the same device; not finite where `values` are not."""
        if not self.is_quantised:
            return values.to(self.tensor)
        values = values.to(torch.float32)
        scale = (values.abs().amax(dim=-1, keepdim=True) / _LARGEST[self.name]).clamp_min(_SMALLEST_SCALE)
        scaled = values / scale
        if self.name == "int8":
            codes = scaled.round().to(torch.int8).view(torch.uint8)
        else:
            codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([codes, scale.view(torch.uint8)], dim=-1)

    def decode(self, stored: Tensor) -> Tensor:
        """Returns `[.., D]`: the stored numbers themselves, float32 where they were quantised; NaN where the scale is not finite."""
        if not self.is_quantised:
            return stored
        codes = stored[..., :-_SCALE_BYTES].view(torch.int8)
        scale = stored[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        if self.name == "int8":
            return codes.to(torch.float32).mul_(scale)
        # Sign, exponent and mantissa land in the places of a float16, whose exponents are 8 less: torch converts float8 on a CPU one
        # number at a time, float16 by vector instructions.
        bits = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return bits.view(torch.float16).to(torch.float32).mul_(scale * 256)

    def to_array(self, stored: Tensor) -> AnyArray:
        """Returns what `encode` made, on the CPU, as an array; no copy."""
        bits = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored
        array: AnyArray = bits.numpy()
        return array

    def to_tensor(self, array: AnyArray) -> Tensor:
        """Returns a stored array as a tensor that `decode` takes; no copy."""
        return torch.from_numpy(array).view(self.tensor)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec(name="bfloat16", array=np.dtype("<u2"), tensor=torch.bfloat16),
        Codec(name="float16", array=np.dtype("<f2"), tensor=torch.float16),
        Codec(name="float32", array=np.dtype("<f4"), tensor=torch.float32),
        Codec(name="int8", array=np.dtype("u1"), tensor=torch.uint8),
        Codec(name="float8_e4m3", array=np.dtype("u1"), tensor=torch.uint8),
    )
}


def token_bytes(dtype: str, d_in: int) -> int:
    """Returns the bytes of one activation of `d_in` numbers before compression."""
    codec = CODECS[dtype]
    return codec.width(d_in) * codec.array.itemsize
