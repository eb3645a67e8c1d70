"""Dense and CSR codes as rows of one width."""

import torch
from torch import Tensor

__all__ = ["dense_to_rows", "pad_rows"]


def pad_rows(acts: Tensor, indices: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (top_acts [N, K], top_indices [N, K]), the largest magnitude first; places not used hold 0 and 0.

    Args:
        acts: [nnz].
        indices: [nnz] int64.
        offsets: [N + 1] int64, where each row's entries begin.
    """
    counts = offsets.diff()
    width = int(counts.max()) if len(counts) else 0
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(acts))
    place = row * width + torch.arange(len(acts), device=row.device) - offsets[row]
    padded = acts.new_zeros(len(counts) * width).index_put((place,), acts).view(len(counts), width)
    padded_indices = indices.new_zeros(len(counts) * width).index_put((place,), indices).view(len(counts), width)
    order = padded.detach().abs().argsort(dim=1, descending=True, stable=True)
    return padded.gather(1, order), padded_indices.gather(1, order)


def dense_to_rows(feature_acts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (top_acts [N, K], top_indices [N, K]) of dense feature activations [N, F]; K is the most any row uses."""
    used = feature_acts != 0
    offsets = torch.zeros(len(feature_acts) + 1, dtype=torch.int64, device=feature_acts.device)
    torch.cumsum(used.sum(dim=1), dim=0, out=offsets[1:])
    return pad_rows(feature_acts[used], used.nonzero()[:, 1], offsets)
