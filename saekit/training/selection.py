"""Which entries are the largest where each process has some of them: exact, with ties as one process would decide them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from saekit_kernels import TopKCode, auxk, decode, encode_threshold, encode_topk
from torch import Tensor

from saekit.training.axis import Axis, bits_of, float_of
from saekit.training.partial import total

__all__ = ["BatchCode", "auxk_over", "batch_cutoff", "batch_topk_over", "topk_over"]

CANDIDATES_FACTOR = 4
"""A process first offers so many times its even share of a token's k. Where features are spread at random none holds more."""
SAMPLE_TOKENS = 64
MARGINS = (1.5, 6.0, 24.0)
"""Entries that a bound should let pass, in multiples of those that are wanted; behind the last one all positive entries do."""


class BatchCode(NamedTuple):
    """Entries of a batch, as `saekit_kernels.encode_batch_topk` returns them."""

    values: Tensor
    indices: Tensor
    offsets: Tensor


def topk_over(axis: Axis, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> TopKCode:
    """Returns this process's entries among the k largest of each token over all features, [N, c] with places of value 0.

    Args:
        axis: processes that hold the other features, in order.
        x: what the encoder multiplies [N, d_in], the same on every process.
        W_enc: of this process's features [d_in, F].
        b_enc: [F].
        k: of each token, over all processes.
    """
    num_features = len(b_enc)
    if axis.size == 1:
        return encode_topk(x, W_enc, b_enc, k)
    if not num_features:
        # It has nothing to offer, but the others ask it.
        _owned(axis, x.new_zeros(len(x), 0), k)
        return TopKCode(x.new_zeros(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64, device=x.device))
    code = encode_topk(x, W_enc, b_enc, min(k, num_features))
    owned = _owned(axis, code.values.detach(), k)
    # A process has about k / R of a token's entries: the others are left out of everything that follows.
    width = max(1, int(owned.sum(1).max())) if len(owned) else 1
    order = owned.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    kept = owned.gather(1, order)
    return TopKCode(code.values.gather(1, order) * kept, code.indices.gather(1, order))


def _owned(axis: Axis, values: Tensor, k: int) -> Tensor:
    """Returns which of a process's values [N, kl], falling and at least 0, are among the k largest of all [N, kl] bool.

    Fewer candidates than k are enough unless all of some process's were taken, while it has more: such tokens are decided anew,
    from k of each.
    """
    padded = torch.nn.functional.pad(values, (0, k - values.shape[1]))
    few = min(k, -(-CANDIDATES_FACTOR * k // axis.size))
    owned, is_certain = _among_largest(axis, padded[:, :few], k)
    owned = torch.nn.functional.pad(owned, (0, k - few))
    if few < k:
        rows = is_certain.logical_not().nonzero().flatten()
        if len(rows):
            owned[rows] = _among_largest(axis, padded[rows], k)[0]
    return owned[:, : values.shape[1]]


def _among_largest(axis: Axis, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns this process's members of the k largest of all candidates [N, c] bool, and whether that is certain [N] bool."""
    num_tokens, width = candidates.shape
    offered = axis.gather(candidates, "candidates").permute(1, 0, 2)  # [N, R, c]
    # Stable: among equals the lower process, and within it the lower feature, comes first.
    order = offered.reshape(num_tokens, -1).argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = torch.zeros(num_tokens, axis.size * width, dtype=torch.bool, device=candidates.device)
    chosen = chosen.scatter_(1, order, True).view(num_tokens, axis.size, width)
    is_open = chosen[:, :, -1] & (offered[:, :, -1] > 0)
    return chosen[:, axis.rank], is_open.any(1).logical_not()


def auxk_over(
    axis: Axis, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int, *, num_features: int
) -> Tensor:
    """Returns what `saekit_kernels.auxk` makes of `num_features` features, of which each process holds some."""
    if axis.size == 1 or num_features <= k:
        return total(axis, auxk(x, W_enc, b_enc, W_dec, max(k, 1)))
    code = topk_over(axis, x, W_enc, b_enc, k)
    nothing = x.new_zeros(len(x), W_dec.shape[1])
    return total(axis, decode(code.values, code.indices, W_dec) if len(b_enc) else nothing)


def batch_topk_over(
    axis: Axis, x: Tensor, W_enc: Tensor, b_enc: Tensor, num_wanted: int, *, place: tuple[int, int]
) -> BatchCode:
    """Returns this process's entries among the `num_wanted` largest positive ones of all tokens and features.

    Args:
        axis: processes that hold other tokens or other features.
        x: what the encoder multiplies [n, d_in].
        W_enc: of this process's features [d_in, F].
        b_enc: [F].
        num_wanted: entries to keep, over all processes.
        place: of the first token among the data axis's processes, and of the first feature; they decide between equals.
    """
    ((values, indices, offsets),), num_found = _candidates(axis, [x], W_enc, b_enc, num_wanted)
    if num_found <= num_wanted:
        return BatchCode(values, indices, offsets)
    bits = bits_of(values.detach())
    edge = axis.kth_largest(values.detach(), num_wanted)
    is_kept, is_equal = bits > edge, bits == edge
    num_above, num_equal = axis.sum(torch.stack([is_kept.sum(), is_equal.sum()]), "selection").tolist()
    if num_above + num_equal > num_wanted:
        rows = torch.arange(len(x), device=x.device).repeat_interleave(offsets.diff(), output_size=len(values))
        keys = (((place[0] << 24) + rows) << 28) + place[1] + indices
        tied = torch.cat(list(axis.gather_rows(keys[is_equal], "selection")))
        is_equal &= keys <= tied.kthvalue(num_wanted - num_above).values
    places = (is_kept | is_equal).nonzero().view(-1)
    before = torch.nn.functional.pad((is_kept | is_equal).cumsum(0), (1, 0))
    return BatchCode(values[places], indices[places], before[offsets])


@torch.no_grad()
def batch_cutoff(
    axis: Axis, parts: Sequence[Tensor], W_enc: Tensor, b_enc: Tensor, num_wanted: int
) -> tuple[Tensor, Tensor]:
    """Returns the number [1] that the `num_wanted` largest positive entries of all parts exceed, and the smallest of them [].

    Args:
        axis: processes that hold other tokens or other features.
        parts: what the encoder multiplies [n, d_in] each.
        W_enc: of this process's features [d_in, F].
        b_enc: [F].
        num_wanted: entries to keep, over all processes; with fewer positive ones the number is 0.
    """
    codes, num_found = _candidates(axis, parts, W_enc, b_enc, num_wanted)
    values = torch.cat([code.values for code in codes])
    if num_found < num_wanted:
        return values.new_zeros(1), values
    edge = axis.kth_largest(values, num_wanted)
    return float_of(edge - 1)[None], values[bits_of(values) >= edge]


def _candidates(
    axis: Axis, parts: Sequence[Tensor], W_enc: Tensor, b_enc: Tensor, num_wanted: int
) -> tuple[list[BatchCode], int]:
    """Returns all entries above a bound that is not above the smallest wanted one, and their number over all processes.

    A few tokens tell the bound; where it lets too few entries pass, a lower one is taken.
    """
    num_tokens = sum(len(part) for part in parts)
    with torch.no_grad():
        step = max(1, num_tokens // SAMPLE_TOKENS)
        sample = torch.cat([part[::step] @ W_enc + b_enc for part in parts]).nan_to_num(nan=0.0).clamp_min(0.0)
        # In tokens times features, of which a process of any layout has as many as the product says.
        size, of = axis.sum(
            torch.tensor([sample.numel(), num_tokens * len(b_enc)], dtype=torch.float64, device=sample.device),
            "selection",
        ).tolist()
    for margin in (*MARGINS, math.inf):
        bound = sample.new_zeros(())
        if margin * num_wanted * size / of < size:
            bound = float_of(axis.kth_largest(sample, math.ceil(margin * num_wanted * size / of)))
        codes = [BatchCode(*encode_threshold(part, W_enc, b_enc, bound.expand(len(b_enc)))) for part in parts]
        own = torch.tensor(sum(len(code.values) for code in codes), device=sample.device)
        num_found = int(axis.sum(own, "selection"))
        if num_found >= num_wanted or not bool(bound > 0):
            break
    return codes, num_found
