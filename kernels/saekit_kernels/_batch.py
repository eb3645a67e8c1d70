"""Selection of the largest pre-activations of a whole batch, made of any backend's threshold.

A few tokens tell a bound that somewhat more entries than wanted should pass; all that do are found in one product, and the
wanted ones selected among them. Where too few pass, the bound is lowered and the product repeated, so the result is exact.
"""

import math

import torch
from torch import Tensor

from saekit_kernels import reference
from saekit_kernels.primitives import Primitives

SAMPLE_TOKENS = 64
# Entries that should pass, in multiples of the wanted ones: the sample is wrong by about a tenth on real activations, and one
# product more costs as much as the selection from all of this.
FIRST_MARGIN = 1.5
NEXT_MARGIN = 4.0


def batch_topk(
    primitives: Primitives, x: Tensor, weight: Tensor, bias: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The len(x) * k largest positive entries of x @ weight.T + bias as CSR: values, indices, offsets."""
    sample = reference.pre_activations(x[:: max(1, -(-len(x) // SAMPLE_TOKENS))], weight, bias)
    # A NaN would be the largest of all, and no bound.
    sample = sample.masked_fill_(sample.isnan(), -math.inf)
    margin = FIRST_MARGIN
    while True:
        num_passing = math.ceil(margin * k * len(sample))
        bound = sample.new_zeros(())
        if 0 < num_passing < sample.numel():
            bound = torch.topk(sample.flatten(), num_passing, sorted=False).values.min().clamp_min(0.0)
        found = primitives.threshold(x, weight, bias, bound.repeat(len(weight)))
        if len(found[0]) >= len(x) * k or not bool(bound > 0):
            return _largest(*found, num_wanted=len(x) * k)
        margin *= NEXT_MARGIN


def _largest(pre_acts: Tensor, indices: Tensor, offsets: Tensor, *, num_wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest entries of a CSR code, NaN first, the first ones among equals."""
    if len(pre_acts) <= num_wanted:
        return pre_acts, indices, offsets
    # Counted from the smallest, NaN is the largest: the smallest entry that is kept.
    edge = torch.kthvalue(pre_acts, len(pre_acts) - num_wanted + 1).values
    is_nan = pre_acts.isnan()
    is_above = (pre_acts > edge) | (is_nan & ~edge.isnan())
    is_equal = (pre_acts == edge) | (is_nan & edge.isnan())
    is_kept = is_above | (is_equal & (is_equal.cumsum(0) <= num_wanted - is_above.sum()))
    num_kept_before = torch.cat([offsets.new_zeros(1), is_kept.cumsum(0)])
    # As many as are wanted, which a device need not be asked for: the others go to a place behind them.
    target = torch.where(is_kept, num_kept_before[:-1], num_wanted)
    places = torch.arange(len(target), device=target.device)
    places = target.new_empty(num_wanted + 1).scatter_(0, target, places)[:-1]
    return pre_acts[places], indices[places], num_kept_before[offsets]
