"""The running state of the pass that finds where features fire: what it keeps, how two of them become one, and on disk."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saekit.activations import StoreView
from saekit.config import Config
from saekit.errors import StoreError
from saekit.labelling.reservoir import Events, Reservoir, Slots, hash_events, rank_largest
from saekit.manifest import atomic_write

__all__ = ["ContextCollector", "ContextConfig"]

NUM_BINS = 16
BINS_PER_OCTAVE = 4 / 3
"""16 bins of a factor 2 ** 0.75 span a factor of 4,096 below the top edge."""


CHUNK = 4096
"""Features whose slots are laid out at a time."""
NUM_PLACES = 16
"""Equal parts of a row in which firings are counted."""
_UNITS = 2.0**28
"""Steps of the summed activations in the pass's scale: a billion firings of eight times the scale fit into an integer."""
_SUMS = ("firing_count", "sum_act", "histogram", "position_count")


class ContextConfig(Config):
    """What the pass keeps of each feature."""

    num_top: int = Field(default=20, ge=1)
    """Contexts of the largest activations, each from another document."""
    num_per_stratum: int = Field(default=4, ge=1)
    """Contexts drawn at random from each of 16 activation bins."""
    window: int = Field(default=32, ge=2, le=1024)
    """Positions around a peak whose activations are kept."""
    num_code_tokens: int = Field(default=262_144, ge=1)
    """Tokens, in whole rows drawn at random, whose activations are kept in full for rules and verified negatives."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens encoded at a time, rounded to whole rows; changes memory and speed, not the result."""
    checkpoint_seconds: float = Field(default=120.0, ge=0)
    """Between two writings of what was found so far, from which a run that was killed goes on; 0: after every batch."""
    seed: int = Field(default=0, ge=0)
    """Of the stratified sample and of the drawn rows."""


class ContextCollector:
    """What a pass has found so far; independent of the order of batches, mergeable, and writable at any batch's end.

    Attributes:
        rows_done: rows taken in, of those that this pass is to see, in their order.
    """

    def __init__(
        self,
        num_features: int,
        view: StoreView,
        config: ContextConfig,
        *,
        scale: float,
        is_code_row: NDArray[np.bool_],
    ) -> None:
        self.config = config
        self.rows_done = 0
        self.scale = scale
        self.num_features = num_features
        self.context_len = view.store.context_len
        self.documents = np.asarray(view.store.documents(), dtype=np.int32).reshape(-1)
        octaves = np.arange(-NUM_BINS, 1) / BINS_PER_OCTAVE
        self.edges = (scale * 2.0**octaves).astype(np.float32)
        self.firing_count = np.zeros(num_features, dtype=np.int64)
        # Fixed point: the sum of integers is the same in any order.
        self.sum_act = np.zeros(num_features, dtype=np.int64)
        self.max_act = np.zeros(num_features, dtype=np.float32)
        self.histogram = np.zeros((num_features, NUM_BINS), dtype=np.int32)
        self.position_count = np.zeros((num_features, NUM_PLACES), dtype=np.int32)
        width = config.window
        self.top = Reservoir(num_features, config.num_top, width=width, dtype=np.uint32)
        self.sample = Reservoir(num_features * NUM_BINS, config.num_per_stratum, width=width, dtype=np.uint64)
        self.is_code_row = is_code_row
        self.code_tokens: list[NDArray[np.int64]] = []
        self.code_parts: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]] = []

    def add(self, flat: NDArray[np.int64], acts: NDArray[np.float32], indices: NDArray[np.int64]) -> None:
        """Takes in the codes of some whole rows: `flat` [n], `acts` and `indices` [n, k]."""
        found = np.flatnonzero(acts > 0)
        token = found // acts.shape[1]
        values, features = acts.reshape(-1)[found], indices.reshape(-1)[found]
        self._keep_codes(flat, token, features, values)
        events = Events(features, flat[token], values, context_len=self.context_len)
        if not len(events):
            return
        starts = np.flatnonzero(np.diff(events.features, prepend=-1))
        present = events.features[starts]
        self.firing_count[present] += np.diff(starts, append=len(events))
        units = np.rint(events.acts.astype(np.float64) * (_UNITS / self.scale)).astype(np.int64)
        self.sum_act[present] += np.add.reduceat(units, starts)
        self.max_act[present] = np.maximum(self.max_act[present], np.maximum.reduceat(events.acts, starts))
        stratum = np.zeros(len(events), dtype=np.uint8)
        # A few passes of comparisons are faster than a search per event.
        for edge in self.edges[1:-1]:
            stratum += events.acts >= edge
        groups = events.features * NUM_BINS + stratum
        # A pass over the events, not over all features, of which a batch has a part.
        np.add.at(self.histogram.reshape(-1), groups, np.int32(1))
        place = events.features * NUM_PLACES + (events.flat % self.context_len) * NUM_PLACES // self.context_len
        np.add.at(self.position_count.reshape(-1), place, np.int32(1))
        documents = self.documents[events.flat]
        self.top.offer(events, events.features, rank_largest(events.acts), documents=documents)
        self.sample.offer(events, groups, hash_events(events.features, events.flat, seed=self.config.seed))

    def _keep_codes(
        self,
        flat: NDArray[np.int64],
        token: NDArray[np.int64],
        features: NDArray[np.int64],
        values: NDArray[np.float32],
    ) -> None:
        wanted = self.is_code_row[flat // self.context_len]
        counts = np.bincount(token, minlength=len(flat))
        kept = wanted[token]
        self.code_tokens.append(flat[wanted])
        self.code_parts.append((counts[wanted], features[kept].astype(np.int32), values[kept]))

    def codes(self) -> dict[str, NDArray[np.generic]]:
        """Returns the arrays of a `CodeSample`."""
        tokens, counts, features, values = self._joined_codes()
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return {"tokens": tokens, "offsets": offsets, "indices": features, "acts": values}

    def merge(self, other: "ContextCollector") -> None:
        """Takes in what another collector found in later rows."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        np.maximum(self.max_act, other.max_act, out=self.max_act)
        self.top.merge(other.top)
        self.sample.merge(other.sample)
        self.code_tokens += other.code_tokens
        self.code_parts += other.code_parts

    def save(self, path: Path) -> None:
        """Writes all of it, atomically."""
        tokens, counts, features, values = self._joined_codes()
        arrays: dict[str, NDArray[np.generic]] = {
            **{name: np.asarray(getattr(self, name)) for name in (*_SUMS, "max_act")},
            **{f"top.{name}": array for name, array in self.top.state().items()},
            **{f"sample.{name}": array for name, array in self.sample.state().items()},
            "code.tokens": tokens,
            "code.counts": counts,
            "code.features": features,
            "code.values": values,
        }
        with atomic_write(path) as file:
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            file.write(save(contiguous, metadata={"rows_done": str(self.rows_done)}))

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote for the same dictionary, documents and config.

        Raises:
            StoreError: the file is broken.
        """
        try:
            with safe_open(str(path), framework="np") as file:
                self.rows_done = int((file.metadata() or {})["rows_done"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            for name in (*_SUMS, "max_act"):
                setattr(self, name, arrays[name])
            for name, reservoir in (("top", self.top), ("sample", self.sample)):
                inner = {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith(f"{name}.")}
                reservoir.restore(inner)
            self.code_tokens = [arrays["code.tokens"]]
            self.code_parts = [(arrays["code.counts"], arrays["code.features"], arrays["code.values"])]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StoreError(f"{str(path)!r}: cannot be read: {error}; remove the folder and rerun") from error

    def _joined_codes(
        self,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        if not self.code_parts:
            none = np.empty(0, dtype=np.int64)
            return none, none, none.astype(np.int32), none.astype(np.float32)
        counts, features, values = (np.concatenate(parts) for parts in zip(*self.code_parts, strict=True))
        return np.concatenate(self.code_tokens), counts, features, values

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Returns the arrays of a `FeatureContexts`."""
        num_sampled = max(1, self.sample.most_used(NUM_BINS))
        found = {
            **_empty_places("top", self.num_features, self.config.num_top, self.config.window),
            **_empty_places("sample", self.num_features, num_sampled, self.config.window),
            "sample_stratum": np.full((self.num_features, num_sampled), -1, dtype=np.int32),
        }
        # Some features at a time: with all of them the slots as an array would be most of the pass's memory.
        for start in range(0, self.num_features, CHUNK):
            stop = min(start + CHUNK, self.num_features)
            self._place(found, "top", start, self.top.slots(start, stop))
            slots = self.sample.slots(start * NUM_BINS, stop * NUM_BINS).joined(NUM_BINS)
            # Each feature fills its own few bins: move the used slots to the left and cut the common rest.
            order = np.argsort(slots.flat < 0, axis=1, kind="stable")[:, :num_sampled]
            slots = slots.take(order)
            self._place(found, "sample", start, slots)
            found["sample_stratum"][start:stop] = np.where(slots.flat >= 0, order // self.config.num_per_stratum, -1)
        mean_units = self.sum_act / np.maximum(self.firing_count, 1)
        return {
            **found,
            "firing_count": self.firing_count,
            "max_act": self.max_act,
            "mean_act": (mean_units * (self.scale / _UNITS)).astype(np.float32),
            "position_count": self.position_count,
            "histogram": self.histogram,
            "histogram_edges": self.edges,
        }

    def _place(self, found: dict[str, NDArray[np.generic]], name: str, start: int, slots: Slots) -> None:
        own = slice(start, start + len(slots.flat))
        used = slots.flat >= 0
        largest = np.where(self.max_act[own] > 0, self.max_act[own], 1)[:, None]
        found[f"{name}_row"][own] = np.where(used, slots.flat // self.context_len, -1)
        found[f"{name}_position"][own] = np.where(used, slots.flat % self.context_len, -1)
        found[f"{name}_act"][own] = slots.acts
        found[f"{name}_window"][own] = np.rint(slots.windows * (slots.tops / largest)[:, :, None])


def _empty_places(name: str, num_features: int, size: int, window: int) -> dict[str, NDArray[np.generic]]:
    return {
        f"{name}_row": np.empty((num_features, size), dtype=np.int32),
        f"{name}_position": np.empty((num_features, size), dtype=np.int32),
        f"{name}_act": np.empty((num_features, size), dtype=np.float32),
        f"{name}_window": np.empty((num_features, size, window), dtype=np.uint8),
    }
