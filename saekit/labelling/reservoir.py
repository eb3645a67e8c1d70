"""Bounded memory of events per group: the best K by a priority, exact and independent of the order of arrival.

An event is one activation above zero: a token (its flat index in the store), a feature and a value.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Events", "Reservoir", "Slots", "hash_events", "rank_largest"]

LEAST_PENDING = 2**18
"""Accepted events that wait to be sorted in, at least; else half as many as are kept."""


class Events:
    """The activations of one batch of whole rows, sorted by (feature, token).

    Args:
        features: int64 [E].
        flat: token indices row * T + position, int64 [E]; a feature has a token at most once.
        acts: float32 [E], all > 0.
        context_len: T.
    """

    def __init__(
        self, features: NDArray[np.int64], flat: NDArray[np.int64], acts: NDArray[np.float32], *, context_len: int
    ) -> None:
        first, span = (int(flat.min()), int(np.ptp(flat)) + 1) if len(flat) else (0, 1)
        token_bits = (span - 1).bit_length()
        feature_bits = max(int(features.max(initial=0)).bit_length(), 1)
        if feature_bits + token_bits + 32 <= 64:
            # The event itself as the key, its activation below: nothing has to be gathered in the sorted order.
            key = features.astype(np.uint64) << np.uint64(token_bits + 32)
            key |= (flat - first).astype(np.uint64) << np.uint64(32)
            key |= acts.view(np.uint32)
            key.sort()
            self.features = (key >> np.uint64(token_bits + 32)).astype(np.int64)
            self.acts = key.astype(np.uint32).view(np.float32)
            key >>= np.uint64(32)
            self.flat = (key & np.uint64((1 << token_bits) - 1)).astype(np.int64) + first
        else:
            # One key of 64 bits sorts four times as fast as two, measured with half a million events.
            order = np.argsort(features * span + (flat - first))
            self.features = features[order]
            self.flat = flat[order]
            self.acts = acts[order]
        self.context_len = context_len

    def __len__(self) -> int:
        return len(self.features)

    def windows(self, chosen: NDArray[np.int64], width: int) -> NDArray[np.float32]:
        """Returns the feature's activations around each chosen event, inside its own row [len(chosen), width].

        The event itself lands at `width // 2`. Neighbours are found by walking the sorted events outwards, so the cost grows
        with the number of firings nearby and not with the number of features.
        """
        half = width // 2
        windows = np.zeros((len(chosen), width), dtype=np.float32)
        windows[:, half] = self.acts[chosen]
        for step, reach in ((-1, half), (1, width - 1 - half)):
            active = np.arange(len(chosen))
            for distance in range(1, reach + 1):
                neighbour = chosen[active] + step * distance
                inside = (neighbour >= 0) & (neighbour < len(self))
                active, neighbour = active[inside], neighbour[inside]
                here = chosen[active]
                there, at = self.flat[neighbour], self.flat[here]
                near = (
                    (self.features[neighbour] == self.features[here])
                    & (np.abs(there - at) <= reach)
                    & (there // self.context_len == at // self.context_len)
                )
                active, neighbour = active[near], neighbour[near]
                if not len(active):
                    break
                windows[active, half + self.flat[neighbour] - self.flat[chosen[active]]] = self.acts[neighbour]
        return windows


def hash_events(features: NDArray[np.int64], flat: NDArray[np.int64], *, seed: int) -> NDArray[np.uint64]:
    """Returns one pseudo-random number per event that depends on nothing but the event and the seed.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied twice.
    """
    return _mix(_mix(features.astype(np.uint64) + np.uint64(seed)) ^ flat.astype(np.uint64))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rank_largest(acts: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Returns a priority that is the smaller the larger the activation is, for finite ones above zero."""
    # The bits of positive floats are in the order of the numbers.
    return np.iinfo(np.uint32).max - acts.view(np.uint32)


class Slots(NamedTuple):
    """What a reservoir keeps, by group, the best first."""

    flat: NDArray[np.int64]
    """Tokens [G, size], -1 where unused."""
    acts: NDArray[np.float32]
    """[G, size], 0 where unused."""
    windows: NDArray[np.uint8]
    """[G, size, width], in 255ths of `tops`."""
    tops: NDArray[np.float32]
    """Largest activation of each window [G, size], 0 where unused."""

    def joined(self, num_neighbours: int) -> "Slots":
        """Returns runs of `num_neighbours` groups as one group each."""
        size = num_neighbours * self.flat.shape[1]
        windows = self.windows.reshape(-1, size, self.windows.shape[2])
        return Slots(self.flat.reshape(-1, size), self.acts.reshape(-1, size), windows, self.tops.reshape(-1, size))

    def take(self, order: NDArray[np.int64]) -> "Slots":
        """Returns, of each group, the slots of `order` [G, n]."""
        at = (np.arange(len(order))[:, None], order)
        return Slots(self.flat[at], self.acts[at], self.windows[at], self.tops[at])


class Reservoir:
    """For each of G groups the `size` events of smallest priority, ties broken by the token index.

    Only slots in use take memory: some 60 bytes each at a width of 32, half as much again while events wait, and as much again
    for a moment when they are sorted in.

    Args:
        num_groups: G.
        size: events kept of a group.
        width: positions of a window.
        dtype: of priorities.
    """

    def __init__(self, num_groups: int, size: int, *, width: int, dtype: type[np.uint32 | np.uint64]) -> None:
        self.num_groups = num_groups
        self.size = size
        self.width = width
        self._dtype = dtype
        # Past it an event cannot be among the best of its group any more.
        self._threshold: NDArray[np.uint32 | np.uint64] = np.full(num_groups, np.iinfo(dtype).max, dtype=dtype)
        self._kept = self._columns(0)
        self._pending: list[dict[str, NDArray[np.generic]]] = []
        self._num_pending = 0

    def offer(
        self,
        events: Events,
        groups: NDArray[np.int64],
        priority: NDArray[np.uint32] | NDArray[np.uint64],
        *,
        documents: NDArray[np.int32] | None = None,
    ) -> None:
        """Takes in a batch; with `documents` [E], at most one event per (group, document) is kept, the best."""
        # The threshold first: once the groups are full, nearly every event stops here.
        new = np.flatnonzero(priority <= self._threshold[groups])
        if not len(new):
            return
        windows = events.windows(new, self.width)
        tops = windows.max(axis=1)
        self._push(
            {
                "group": groups[new].astype(np.int32),
                "priority": priority[new],
                "flat": events.flat[new],
                "document": np.full(len(new), -1, dtype=np.int32) if documents is None else documents[new],
                "acts": events.acts[new],
                "tops": tops,
                "windows": np.rint(windows * (np.float32(255) / tops)[:, None]).astype(np.uint8),
            }
        )

    def merge(self, other: "Reservoir") -> None:
        """Takes in what another reservoir of the same form kept of other events; the result is that of one which saw them all."""
        self._push(other.state())

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Returns what is kept as flat arrays, see `restore`."""
        self._settle()
        return dict(self._kept)

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Fills an empty reservoir with the `state` of another of the same form."""
        self._push({name: state[name] for name in self._kept})
        self._settle()

    def most_used(self, num_neighbours: int) -> int:
        """Returns the most slots that any run of `num_neighbours` groups uses together."""
        self._settle()
        return int(np.bincount(self._kept["group"] // num_neighbours, minlength=1).max())

    def slots(self, start: int = 0, stop: int | None = None) -> Slots:
        """Returns what is kept of the groups `start` to `stop`."""
        self._settle()
        stop = self.num_groups if stop is None else stop
        first, last = np.searchsorted(self._kept["group"], [start, stop])
        own = {name: column[first:last] for name, column in self._kept.items()}
        at = (own["group"] - start, _rank_in_group(own["group"]))
        shape = (stop - start, self.size)
        found = Slots(
            flat=np.full(shape, -1, dtype=np.int64),
            acts=np.zeros(shape, dtype=np.float32),
            windows=np.zeros((*shape, self.width), dtype=np.uint8),
            tops=np.zeros(shape, dtype=np.float32),
        )
        for name, array in found._asdict().items():
            array[at] = own[name]
        return found

    def _columns(self, num: int) -> dict[str, NDArray[np.generic]]:
        return {
            "group": np.empty(num, dtype=np.int32),
            "priority": np.empty(num, dtype=self._dtype),
            "flat": np.empty(num, dtype=np.int64),
            "document": np.empty(num, dtype=np.int32),
            "acts": np.empty(num, dtype=np.float32),
            "tops": np.empty(num, dtype=np.float32),
            "windows": np.empty((num, self.width), dtype=np.uint8),
        }

    def _push(self, columns: dict[str, NDArray[np.generic]]) -> None:
        self._pending.append(columns)
        self._num_pending += len(columns["group"])
        if self._num_pending > max(LEAST_PENDING, len(self._kept["group"]) // 2):
            self._settle()

    def _settle(self) -> None:
        """Sorts in what waits, and drops what is past the size of its group."""
        if not self._num_pending:
            return
        parts, self._pending, self._num_pending = [dict(self._kept), *self._pending], [], 0
        group, priority, flat, document = (
            np.concatenate([part[name] for part in parts]) for name in ("group", "priority", "flat", "document")
        )
        chosen = _first_of_each(group, document, priority, flat)
        chosen = chosen[_order(group[chosen], priority[chosen], flat[chosen])]
        rank = _rank_in_group(group[chosen])
        is_last = rank == self.size - 1
        self._threshold[group[chosen[is_last]]] = priority[chosen[is_last]]
        chosen = chosen[rank < self.size]
        # One column after the other, each freed before the next: windows are most of it.
        for name in self._kept:
            self._kept[name] = np.concatenate([part.pop(name) for part in parts])[chosen]


def _order(group: NDArray[np.generic], priority: NDArray[np.generic], flat: NDArray[np.generic]) -> NDArray[np.int64]:
    """Returns the order by (group, priority, flat)."""
    if not len(group):
        return np.empty(0, dtype=np.int64)
    free = np.uint64(64 - int(group.max()).bit_length())
    width = np.uint64(priority.dtype.itemsize * 8)
    short = priority.astype(np.uint64) >> (width - free if width > free else np.uint64(0))
    key = group.astype(np.uint64) << free if int(group.max()) else np.zeros(len(group), dtype=np.uint64)
    return _order_by(key | short, (flat, priority))


def _order_by(key: NDArray[np.uint64], ties: tuple[NDArray[np.generic], ...]) -> NDArray[np.int64]:
    """Returns the order by `key`, and among equals by the last of `ties` first, as `lexsort` has it."""
    # An unstable sort of one key is several times as fast as a stable one of three, and equal keys are few.
    order = np.argsort(key)
    sorted_key = key[order]
    same = sorted_key[1:] == sorted_key[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    own = order[tied]
    order[tied] = own[np.lexsort((*(tie[own] for tie in ties), key[own]))]
    return order


def _rank_in_group(group: NDArray[np.generic]) -> NDArray[np.int64]:
    """Returns each entry's place within its run of equal values, for a sorted array."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    lengths = np.diff(starts, append=len(group))
    return np.arange(len(group)) - np.repeat(starts, lengths)


def _first_of_each(
    group: NDArray[np.generic], document: NDArray[np.int32], priority: NDArray[np.generic], flat: NDArray[np.generic]
) -> NDArray[np.int64]:
    """Returns the places of the best entry of each (group, document), and of all entries without a document."""
    free, owned = np.flatnonzero(document < 0), np.flatnonzero(document >= 0)
    if not len(owned):
        return free
    key = group[owned].astype(np.uint64) << np.uint64(32) | document[owned].astype(np.uint64)
    order = _order_by(key, (flat[owned], priority[owned]))
    best = np.ones(len(order), dtype=bool)
    best[1:] = key[order[1:]] != key[order[:-1]]
    return np.concatenate([free, owned[order[best]]])
