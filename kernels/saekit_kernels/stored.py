"""Rows in files and in memory, by the compiled kernels: chunks read and checked, rows gathered as float32.

Other Python threads run meanwhile. Both functions say whether they did it: where the kernels are not built, or SAEKIT_KERNELS
names other ones, the caller goes its own way.
"""

import os

import torch
from torch import Tensor

from saekit_kernels import _build
from saekit_kernels.backend import ENVIRONMENT_VARIABLE

__all__ = ["gather_rows", "read_chunks"]

_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def read_chunks(
    files: Tensor, offsets: Tensor, lengths: Tensor, sizes: Tensor, out: Tensor, *, by_tables: bool = False
) -> bool:
    """Reads the first bytes of each chunk into `out`, one chunk after another, and compares all of it with its crc32c.

    Args:
        files: `[n]` int64, open files.
        offsets: `[n]` int64, where in its file each chunk begins; behind it lie four bytes of crc32c, the lowest first.
        lengths: `[n]` int64, bytes of the whole chunk.
        sizes: `[n]` int64, bytes of it that are wanted.
        out: as many bytes as all sizes together.
        by_tables: leaves the processor's own instruction for crc32c aside.

    Returns:
        Whether all of them are read and right; if not, what `out` holds says nothing.
    """
    if not _is_wanted():
        return False
    whole = torch.zeros(1, dtype=torch.int64)
    arguments = (files, offsets, lengths, sizes, out, whole)
    _build.library().saekit_read_chunks(*(argument.data_ptr() for argument in arguments), len(files), int(by_tables))
    return int(whole) == len(files)


def gather_rows(rows: Tensor, indices: Tensor, out: Tensor) -> bool:
    """Writes `rows[indices]` into float32 `out`, the bits of `out.copy_(rows.index_select(0, indices))`, if it can.

    Args:
        rows: `[R, D]` on the CPU.
        indices: `[n]` int64 below R; not checked.
        out: `[n, D]` float32; its rows may lie apart, the numbers of a row may not.
    """
    if rows.dtype not in _NUMBERS or not rows.is_contiguous() or out.stride(1) != 1 or not _is_wanted():
        return False
    indices = indices.contiguous()
    _build.library().saekit_gather_rows(
        rows.data_ptr(),
        indices.data_ptr(),
        out.data_ptr(),
        len(indices),
        rows.shape[1],
        out.stride(0),
        _NUMBERS[rows.dtype],
        torch.get_num_threads(),
    )
    return True


def _is_wanted() -> bool:
    named = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return named in ("auto", "compiled", "") and _build.why_unavailable(notify=True) is None
