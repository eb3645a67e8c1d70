"""Chunks of several shard files at once, by compiled code that holds neither the interpreter nor a thread of its own."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from saekit_kernels.stored import read_chunks

from saekit.activations.order import Indices
from saekit.activations.shardfile import Bytes, ShardFile

__all__ = ["read_together"]


def read_together(files: Sequence[ShardFile], chunks: Sequence[Indices], sizes: Indices, out: Bytes) -> bool:
    """Reads what `ShardFile.read_chunks` of one file after another does, and checks it as that does.

    Args:
        files: on a disk of this machine.
        chunks: of each file, ascending.
        sizes: bytes of each chunk that are wanted, decompressed, through all files.
        out: of all of them.

    Returns:
        Whether all is read and right. If not, chunks are compressed, nothing is compiled here, or `ShardFile.read_chunks` says
        what is wrong.
    """
    found = [file.plain_chunks(some) for file, some in zip(files, chunks, strict=True)]
    plain = [some for some in found if some is not None]
    if len(plain) < len(found):
        return False
    counts = [len(some) for some in chunks]
    each = functools.partial(np.repeat, repeats=counts)
    return read_chunks(
        torch.from_numpy(each([some.file for some in plain])),
        torch.from_numpy(np.concatenate([some.offsets for some in plain])),
        torch.from_numpy(each([some.length for some in plain])),
        torch.from_numpy(sizes),
        torch.from_numpy(out),
    )
