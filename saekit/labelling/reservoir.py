"""Bounded memory of events per group: the best K by a priority, exact and independent of the order of arrival.

An event is one activation above zero: a token (its flat index in the store), a feature and a value.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["Events", "Reservoir", "hash_events"]


class Events:
    """The activations of one batch of whole rows, sorted by (feature, token).

    Args:
        features: int64 [E].
        flat: token indices row * T + position, int64 [E].
        acts: float32 [E], all > 0.
        context_len: T.
    """

    def __init__(
        self, features: NDArray[np.int64], flat: NDArray[np.int64], acts: NDArray[np.float32], *, context_len: int
    ) -> None:
        order = np.lexsort((flat, features))
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
        row = self.flat // self.context_len
        for step, reach in ((-1, half), (1, width - 1 - half)):
            active = np.arange(len(chosen))
            for distance in range(1, reach + 1):
                neighbour = chosen[active] + step * distance
                inside = (neighbour >= 0) & (neighbour < len(self))
                active, neighbour = active[inside], neighbour[inside]
                here = chosen[active]
                near = (
                    (self.features[neighbour] == self.features[here])
                    & (row[neighbour] == row[here])
                    & (np.abs(self.flat[neighbour] - self.flat[here]) <= reach)
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


class Reservoir:
    """For each of G groups the `size` events of smallest priority, ties broken by the token index.

    Attributes:
        priority: [G, size], ascending; the dtype's largest value where unused.
        flat: int64 [G, size], -1 where unused.
        acts: float32 [G, size].
        windows: float16 [G, size, width], activations divided by `scale`.
    """

    def __init__(
        self, num_groups: int, size: int, *, width: int, scale: float, dtype: type[np.float32 | np.uint64]
    ) -> None:
        self._worst = np.array(np.inf if dtype is np.float32 else np.iinfo(np.uint64).max, dtype=dtype)
        self.size = size
        self.scale = scale
        self.priority: NDArray[np.float32 | np.uint64] = np.full((num_groups, size), self._worst, dtype=dtype)
        self.flat = np.full((num_groups, size), -1, dtype=np.int64)
        self.documents = np.full((num_groups, size), -1, dtype=np.int64)
        self.acts = np.zeros((num_groups, size), dtype=np.float32)
        self.windows = np.zeros((num_groups, size, width), dtype=np.float16)

    def offer(
        self,
        events: Events,
        groups: NDArray[np.int64],
        priority: NDArray[np.float32] | NDArray[np.uint64],
        *,
        documents: NDArray[np.int64] | None = None,
    ) -> None:
        """Takes in a batch; with `documents` [E], at most one event per (group, document) is kept, the best."""
        # The threshold first: once the groups are full, nearly every event stops here.
        new = np.flatnonzero(priority <= self.priority[groups, -1])
        self._take(
            groups[new],
            priority[new],
            events.flat[new],
            events.acts[new],
            np.full(len(new), -1, dtype=np.int64) if documents is None else documents[new],
            lambda chosen: (events.windows(new[chosen], self.windows.shape[2]) / self.scale).astype(np.float16),
            is_by_document=documents is not None,
        )

    def merge(self, other: "Reservoir") -> None:
        """Takes in what another reservoir of the same form kept of other events; the result is that of one which saw them all."""
        group, slot = np.nonzero(other.flat >= 0)
        self._take(
            group,
            other.priority[group, slot],
            other.flat[group, slot],
            other.acts[group, slot],
            other.documents[group, slot],
            lambda chosen: other.windows[group[chosen], slot[chosen]],
            is_by_document=bool((other.documents[group, slot] >= 0).any()),
        )

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Returns the used slots as flat arrays, see `restore`."""
        group, slot = np.nonzero(self.flat >= 0)
        return {
            "group": group,
            "slot": slot,
            **{name: getattr(self, name)[group, slot] for name in _KEPT},
        }

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Fills an empty reservoir with the `state` of another of the same form."""
        for name in _KEPT:
            getattr(self, name)[state["group"], state["slot"]] = state[name]

    def _take(
        self,
        groups: NDArray[np.int64],
        priority: NDArray[np.float32] | NDArray[np.uint64] | NDArray[np.float32 | np.uint64],
        flat_new: NDArray[np.int64],
        acts_new: NDArray[np.float32],
        documents_new: NDArray[np.int64],
        windows_of: Callable[[NDArray[np.int64]], NDArray[np.float16]],
        *,
        is_by_document: bool,
    ) -> None:
        if not len(groups):
            return
        touched = np.unique(groups)
        old_group, old_slot = np.nonzero(self.flat[touched] >= 0)
        old_group = touched[old_group]
        group = np.concatenate([old_group, groups])
        rank_by = np.concatenate([self.priority[old_group, old_slot], priority])
        flat = np.concatenate([self.flat[old_group, old_slot], flat_new])
        acts = np.concatenate([self.acts[old_group, old_slot], acts_new])
        document = np.concatenate([self.documents[old_group, old_slot], documents_new])
        order = np.lexsort((flat, rank_by, group))
        if is_by_document:
            order = order[_first_of_each(group[order], document[order])]
        slot = _rank_in_group(group[order])
        order, slot = order[slot < self.size], slot[slot < self.size]

        windows = np.zeros((len(order), self.windows.shape[2]), dtype=np.float16)
        is_old = order < len(old_group)
        kept = order[is_old]
        windows[is_old] = self.windows[old_group[kept], old_slot[kept]]
        windows[~is_old] = windows_of(order[~is_old] - len(old_group))

        self.flat[touched] = -1
        self.priority[touched] = self._worst
        at = (group[order], slot)
        self.priority[at], self.flat[at], self.documents[at] = rank_by[order], flat[order], document[order]
        self.acts[at], self.windows[at] = acts[order], windows


_KEPT = ("priority", "flat", "documents", "acts", "windows")


def _rank_in_group(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns each entry's place within its run of equal values, for a sorted array."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    lengths = np.diff(starts, append=len(group))
    return np.arange(len(group)) - np.repeat(starts, lengths)


def _first_of_each(group: NDArray[np.int64], document: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the places of the first entry of each (group, document), in order."""
    by_document = np.lexsort((document, group))
    first = np.ones(len(group), dtype=bool)
    before, after = by_document[:-1], by_document[1:]
    first[after] = (group[after] != group[before]) | (document[after] != document[before])
    return np.flatnonzero(first)
