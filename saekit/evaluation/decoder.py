"""How a decoder's directions lie to each other: nearest features by cosine, in bounded memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from saekit.progress import NO_PROGRESS, Progress

__all__ = ["NUM_NEIGHBORS", "DecoderNeighbors", "decoder_neighbors"]

NUM_NEIGHBORS = 8
"""Nearest features kept of each feature."""

# Bytes of one block of cosines [rows, F]: 131k features come in blocks of 256 rows.
_BLOCK_BYTES = 128 * 2**20


class DecoderNeighbors(NamedTuple):
    """The nearest features of every feature, nearest first."""

    indices: Tensor
    """`[F, 8]` int32; -1 where the dictionary has fewer features."""
    cosines: Tensor
    """`[F, 8]` float32; 0 where the dictionary has fewer features."""


def decoder_neighbors(
    W_dec: Tensor, *, block_bytes: int = _BLOCK_BYTES, progress: Progress = NO_PROGRESS
) -> DecoderNeighbors:
    """Returns each feature's nearest other features by cosine of decoder rows.

    Args:
        W_dec: decoder `[F, d_in]`; a row of zeros has cosine 0 with everything.
        block_bytes: memory for the cosines of one block of rows with all features.
    """
    num_features = len(W_dec)
    unit = torch.nn.functional.normalize(W_dec.detach().float(), dim=-1, eps=1e-30)
    num_found = min(NUM_NEIGHBORS, num_features - 1)
    indices = torch.full((num_features, NUM_NEIGHBORS), -1, dtype=torch.int32)
    cosines = torch.zeros(num_features, NUM_NEIGHBORS)
    block = max(1, block_bytes // (4 * num_features))
    with progress.task("decoder cosines", num_features, "features") as task:
        for start in range(0, num_features, block):
            rows = torch.arange(start, min(start + block, num_features), device=unit.device)
            similar = unit[rows] @ unit.T  # [rows, F]
            similar[rows - start, rows] = -torch.inf
            nearest = similar.topk(num_found, dim=-1)
            indices[start : start + len(rows), :num_found] = nearest.indices.to("cpu", torch.int32)
            cosines[start : start + len(rows), :num_found] = nearest.values.clamp(-1.0, 1.0).cpu()
            task.advance(len(rows))
    return DecoderNeighbors(indices, cosines)
