"""Collectives among the processes along one axis of a layout, and what they send over the network."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Axis", "Traffic", "bits_of", "float_of"]

HALF_BITS = 0x7FFFFFFF
DIGITS = ((20, 11), (9, 11), (0, 9))
"""Shift and width of the parts in which the 31 bits of a float32 without sign are looked at."""


class Traffic:
    """Bytes that this process has sent, by what for.

    Counted as rings send them (Patarasuk and Yuan 2009): of R processes each sends 2 (R - 1) / R of what is summed over all, and
    (R - 1) times its own part of what is gathered.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def count(self, purpose: str, num_bytes: float) -> None:
        """Adds bytes sent."""
        self.sent[purpose] += round(num_bytes)

    def take(self) -> dict[str, int]:
        """Returns what was sent since the last call."""
        found, self.sent = dict(self.sent), Counter()
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing is counted."""
        before = self.sent.copy()
        yield
        self.sent = before


class Axis:
    """Processes that hold different parts of one thing; a single one holds all of it, and nothing is sent.

    Attributes:
        rank: place of this process.
        size: number of processes.
        traffic: where bytes are counted.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, traffic: Traffic | None = None) -> None:
        """Takes an initialised group; None = this process alone."""
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.traffic = traffic if traffic is not None else Traffic()

    def sum(self, value: Tensor, purpose: str = "figures") -> Tensor:
        """Returns the sum over processes, the same bits on each; the value itself where there is one."""
        return self._reduce(value, dist.ReduceOp.SUM, purpose)

    def least(self, value: Tensor, purpose: str = "figures") -> Tensor:
        """Returns the elementwise minimum over processes."""
        return self._reduce(value, dist.ReduceOp.MIN, purpose)

    def any(self, flags: Tensor, purpose: str = "figures") -> Tensor:
        """Returns where a flag [...] bool is set on any process; a byte a flag is sent."""
        return self._reduce(flags.to(torch.uint8), dist.ReduceOp.MAX, purpose) > 0 if self.size > 1 else flags

    def start_sum(self, value: Tensor, purpose: str) -> dist.Work | None:
        """Begins to sum a contiguous tensor in place; `wait` of what is returned ends it."""
        if self.size == 1:
            return None
        self.traffic.count(purpose, 2 * (self.size - 1) / self.size * value.nbytes)
        work: dist.Work | None = dist.all_reduce(value, group=self.group, async_op=True)
        return work

    def gather(self, value: Tensor, purpose: str) -> Tensor:
        """Returns the processes' values of one shape [...] in order, [R, ...]."""
        if self.size == 1:
            return value[None]
        value = value.contiguous()
        self.traffic.count(purpose, (self.size - 1) * value.nbytes)
        parts = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(parts, value, group=self.group)
        return torch.stack(parts)

    def gather_rows(self, value: Tensor, purpose: str) -> Sequence[Tensor]:
        """Returns the processes' values in order, which may have different numbers of rows."""
        if self.size == 1:
            return [value]
        counts = self.gather(torch.tensor(len(value), device=value.device), purpose).tolist()
        padded = value.new_zeros(max(counts), *value.shape[1:])
        padded[: len(value)] = value
        return [part[:count] for part, count in zip(self.gather(padded, purpose), counts, strict=True)]

    @torch.no_grad()
    def kth_largest(self, values: Tensor, k: Tensor | int, purpose: str = "selection") -> Tensor:
        """Returns the bits [] int32 of the k-th largest of the numbers of all processes, 0 where there are fewer.

        Exact for any distribution of the numbers over the processes: bits of numbers without sign are ordered as these are, and are
        found from the highest digit down, by a sum of 2,048 counts for each of three digits. NaN is the largest of all.

        Args:
            values: of this process [...] float32, at least 0 or NaN.
            k: at least 1, the same on every process.
            purpose: for the traffic.
        """
        bits = bits_of(values).flatten()
        left = torch.as_tensor(k, dtype=torch.int64, device=values.device)
        found = torch.zeros((), dtype=torch.int32, device=values.device)
        is_candidate = torch.ones_like(bits, dtype=torch.int64)
        for shift, width in DIGITS:
            digit = (bits >> shift) & ((1 << width) - 1)
            counts = torch.zeros(1 << width, dtype=torch.int64, device=values.device)
            counts = self.sum(counts.index_add_(0, digit.long(), is_candidate), purpose).flip(0)
            reached = counts.cumsum(0)
            # Nothing reaches k where there are too few numbers: then the lowest digit, 0, is taken.
            place = torch.where(reached[-1] >= left, (reached >= left).to(torch.int8).argmax(), len(counts) - 1)
            left = left - torch.where(place > 0, reached[(place - 1).clamp_min(0)], 0)
            chosen = len(counts) - 1 - place
            found = found | (chosen << shift).to(torch.int32)
            is_candidate = is_candidate * (digit == chosen)
        return found

    def _reduce(self, value: Tensor, how: dist.ReduceOp.RedOpType, purpose: str) -> Tensor:
        if self.size == 1:
            return value
        self.traffic.count(purpose, 2 * (self.size - 1) / self.size * value.nbytes)
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, op=how, group=self.group)
        return total


def bits_of(values: Tensor) -> Tensor:
    """Returns the bits [...] int32 of numbers [...] that are at least 0 or NaN, in their order and NaN last."""
    bits = values.float().contiguous().view(torch.int32)
    return bits.masked_fill(values.isnan(), HALF_BITS)


def float_of(bits: Tensor) -> Tensor:
    """Returns the number [] float32 of bits [] int32."""
    return bits.view(torch.float32)
