"""Where each feature fires: top and sampled contexts, counts and histograms, written by one pass, read by everything after.

Shapes: F features, K top contexts, S sampled contexts, W window positions, R rows of T tokens, N tokens of the code sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from saekit.errors import StoreError
from saekit.manifest import read_manifest

__all__ = ["CODES_NAME", "CONTEXTS_NAME", "CodeSample", "Context", "FeatureContexts"]

CONTEXTS_NAME = "contexts.safetensors"
CODES_NAME = "codes.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One place at which a feature fires."""

    row: int
    """Row of the token store."""
    position: int
    """Position of the peak in that row."""
    act: float
    """Activation at the peak."""
    window: NDArray[np.uint8]
    """Activations at positions `position - W // 2 ...` [W]; 255 is the feature's largest activation, 0 outside the view."""
    stratum: int | None = None
    """Histogram bin it was sampled from; None for a top context."""


class CodeSample:
    """All activations on some whole rows of the training documents: the base rates that rules are chosen against.

    Attributes:
        tokens: flat indices (row * T + position) of the sampled tokens, ascending, int64 [N].
        offsets: the activations of token `tokens[n]` lie at `offsets[n]:offsets[n + 1]`, int64 [N + 1].
        indices: features, int32 [nnz].
        acts: activations, all > 0, float32 [nnz].
    """

    def __init__(
        self,
        *,
        tokens: NDArray[np.int64],
        offsets: NDArray[np.int64],
        indices: NDArray[np.int32],
        acts: NDArray[np.float32],
    ) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.indices = indices
        self.acts = acts

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return len(self.tokens)

    def owners(self) -> NDArray[np.int64]:
        """Returns, for each activation, the number n of its token in `tokens` [nnz]."""
        return np.repeat(np.arange(self.num_tokens, dtype=np.int64), np.diff(self.offsets))


class FeatureContexts:
    """The contexts of all features of one dictionary, as arrays.

    Attributes:
        top_row, top_position: int32 [F, K], -1 where the feature fires in fewer than K documents.
        top_act: float32 [F, K], descending.
        top_window: uint8 [F, K, W], 255 = `max_act` of the feature.
        sample_row, sample_position, sample_act, sample_window, sample_stratum: the same for the stratified sample [F, S, ...],
            ordered by stratum, -1 where unused.
        firing_count: int64 [F], tokens with an activation above zero.
        max_act, mean_act: float32 [F]; the mean is over firings, 0 for a feature that never fires.
        position_count: int32 [F, 16], firings by place in the row, in 16 equal parts.
        histogram: int32 [F, 16], firings by activation; the outer bins also hold what lies beyond them.
        histogram_edges: float32 [17], shared, equally spaced in log.
        num_tokens: tokens the pass has seen.
    """

    def __init__(self, path: Path, arrays: dict[str, NDArray[np.generic]], num_tokens: int) -> None:
        self.path = path
        self.num_tokens = num_tokens
        self.top_row: NDArray[np.int32] = arrays["top_row"].astype(np.int32, copy=False)
        self.top_position: NDArray[np.int32] = arrays["top_position"].astype(np.int32, copy=False)
        self.top_act: NDArray[np.float32] = arrays["top_act"].astype(np.float32, copy=False)
        self.top_window: NDArray[np.uint8] = arrays["top_window"].astype(np.uint8, copy=False)
        self.sample_row: NDArray[np.int32] = arrays["sample_row"].astype(np.int32, copy=False)
        self.sample_position: NDArray[np.int32] = arrays["sample_position"].astype(np.int32, copy=False)
        self.sample_act: NDArray[np.float32] = arrays["sample_act"].astype(np.float32, copy=False)
        self.sample_window: NDArray[np.uint8] = arrays["sample_window"].astype(np.uint8, copy=False)
        self.sample_stratum: NDArray[np.int32] = arrays["sample_stratum"].astype(np.int32, copy=False)
        self.firing_count: NDArray[np.int64] = arrays["firing_count"].astype(np.int64, copy=False)
        self.max_act: NDArray[np.float32] = arrays["max_act"].astype(np.float32, copy=False)
        self.mean_act: NDArray[np.float32] = arrays["mean_act"].astype(np.float32, copy=False)
        self.position_count: NDArray[np.int32] = arrays["position_count"].astype(np.int32, copy=False)
        self.histogram: NDArray[np.int32] = arrays["histogram"].astype(np.int32, copy=False)
        self.histogram_edges: NDArray[np.float32] = arrays["histogram_edges"].astype(np.float32, copy=False)

    @classmethod
    def open(cls, path: str | Path) -> "FeatureContexts":
        """Reads a finished contexts folder.

        Raises:
            StoreError: the folder is missing, unfinished, of another stage, or its file is broken.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None or manifest.stage != "contexts":
            raise StoreError(f"{str(path)!r}: no contexts, needs a folder written by collect_contexts")
        if manifest.status != "complete":
            raise StoreError(f"{str(path)!r}: the contexts stage has not finished; run it again")
        num_tokens = manifest.counts.get("num_tokens")
        try:
            arrays = load_file(path / CONTEXTS_NAME)
            return cls(path, arrays, num_tokens if isinstance(num_tokens, int) else 0)
        except (OSError, SafetensorError, KeyError) as error:
            raise StoreError(
                f"{str(path / CONTEXTS_NAME)!r}: cannot be read: {error}; remove the folder and rerun"
            ) from error

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.firing_count)

    @property
    def window(self) -> int:
        """W, positions in a window; the peak is at `W // 2`."""
        return int(self.top_window.shape[2])

    @property
    def density(self) -> NDArray[np.float64]:
        """Share of tokens on which each feature fires [F]."""
        return self.firing_count / max(self.num_tokens, 1)

    def feature(self, index: int) -> list[Context]:
        """Returns the feature's top contexts, largest activation first, each from another document."""
        used = np.flatnonzero(self.top_row[index] >= 0)
        return [
            Context(
                row=int(self.top_row[index, slot]),
                position=int(self.top_position[index, slot]),
                act=float(self.top_act[index, slot]),
                window=self.top_window[index, slot],
            )
            for slot in used
        ]

    def sample(self, index: int) -> list[Context]:
        """Returns the feature's stratified sample, weakest stratum first."""
        used = np.flatnonzero(self.sample_row[index] >= 0)
        return [
            Context(
                row=int(self.sample_row[index, slot]),
                position=int(self.sample_position[index, slot]),
                act=float(self.sample_act[index, slot]),
                window=self.sample_window[index, slot],
                stratum=int(self.sample_stratum[index, slot]),
            )
            for slot in used
        ]

    def without(self, is_out: NDArray[np.bool_]) -> "FeatureContexts":
        """Returns the same without the contexts whose peak is at a place that is out [R, T].

        Counts and largest activations stay those of the whole pass, but a feature that has no context left fires nowhere.
        """
        arrays: dict[str, NDArray[np.generic]] = dict(vars(self))
        for kind in ("top", "sample"):
            row, position = arrays[f"{kind}_row"].astype(np.int64), arrays[f"{kind}_position"].astype(np.int64)
            arrays[f"{kind}_row"] = np.where((row >= 0) & ~is_out[row, position], row, -1)
        made = FeatureContexts(self.path, arrays, self.num_tokens)
        is_left = (made.top_row >= 0).any(axis=1) | (made.sample_row >= 0).any(axis=1)
        made.firing_count = np.where(is_left, self.firing_count, 0)
        return made

    def codes(self) -> CodeSample:
        """Reads the sampled rows' activations.

        Raises:
            StoreError: the file is broken.
        """
        path = self.path / CODES_NAME
        try:
            arrays = load_file(path)
            return CodeSample(
                tokens=arrays["tokens"], offsets=arrays["offsets"], indices=arrays["indices"], acts=arrays["acts"]
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise StoreError(f"{str(path)!r}: cannot be read: {error}; remove the folder and rerun") from error

    def firing(self) -> Sequence[int]:
        """Returns the features that fire at all, ascending."""
        return [int(index) for index in np.flatnonzero(self.firing_count > 0)]
