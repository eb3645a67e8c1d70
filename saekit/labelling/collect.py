"""One streaming pass over the training documents that finds where each feature fires; memory grows with features only."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.numpy import save

from saekit.activations import PairedStore, StoreView
from saekit.config import Config
from saekit.errors import DataError, NonFiniteError
from saekit.labelling.contexts import CODES_NAME, CONTEXTS_NAME, FeatureContexts
from saekit.labelling.reservoir import Events, Reservoir, hash_events
from saekit.manifest import atomic_write, begin_stage, finish_stage
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE, Crosscoder, SitesSAE
from saekit.sae.batch import batch_width, token_code

__all__ = [
    "ContextConfig",
    "collect_contexts",
    "draw_rows",
    "encoded_rows",
    "sae_fingerprint",
]

NUM_BINS = 16
BINS_PER_OCTAVE = 4 / 3
"""16 bins of a factor 2 ** 0.75 span a factor of 4,096 below the top edge."""


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
    seed: int = Field(default=0, ge=0)
    """Of the stratified sample and of the drawn rows."""


def collect_contexts(
    sae: SAE, view: StoreView, *, config: ContextConfig, out: str | Path, progress: Progress = NO_PROGRESS
) -> FeatureContexts:
    """Returns the contexts of all features over the tokens of `view`, from `out` if a former pass finished there.

    Args:
        sae: any dictionary with `encode_sparse`. Of a multi-layer SAE a token has each feature's largest activation over hook
            points.
        view: the training documents; other tokens of their rows count as silent.
        config: what to keep.
        out: folder for contexts.safetensors, codes.safetensors and the manifest.
        progress: told of tokens.

    Raises:
        ConfigError: `out` was written with another config, dictionary or other documents.
        DataError: the view has no tokens, or another width than the dictionary.
        NonFiniteError: the dictionary yields NaN or Inf.
    """
    out = Path(out)
    if view.d_in != batch_width(sae):
        raise DataError(f"contexts: activations are {view.d_in} wide, the dictionary needs {batch_width(sae)}")
    if view.num_tokens == 0:
        raise DataError("contexts: the training view has no tokens, needs at least one")
    # How many tokens go at a time is no property of the result, so a resumed run may choose another number.
    values = {key: value for key, value in config.to_dict().items() if key != "batch_tokens"}
    inputs = {"cache": view.store.sha256, "documents": view.fingerprint, "sae": sae_fingerprint(sae)}
    if begin_stage(out, "contexts", values, inputs) == "complete":
        return FeatureContexts.open(out)
    collector = _Collector(sae.cfg.d_sae, view, config, scale=_largest_expected(sae, view))
    rows = np.asarray(view.rows(), dtype=np.int64)
    with progress.task("contexts", view.num_tokens, "tokens") as task:
        for flat, acts, indices in encoded_rows(sae, view, rows, batch_tokens=config.batch_tokens):
            collector.add(flat, acts, indices)
            task.advance(len(flat))
    with atomic_write(out / CODES_NAME) as file:
        file.write(save(collector.codes()))
    with atomic_write(out / CONTEXTS_NAME) as file:
        file.write(save(collector.arrays()))
    silent = int((collector.firing_count == 0).sum())
    counts = {
        "num_tokens": view.num_tokens,
        "features": sae.cfg.d_sae,
        "silent_features": silent,
        "code_tokens": int(sum(map(len, collector.code_tokens))),
    }
    finish_stage(out, counts)
    progress.say(f"contexts: {sae.cfg.d_sae - silent} of {sae.cfg.d_sae} features fire on {view.num_tokens} tokens")
    return FeatureContexts.open(out)


def encoded_rows(
    sae: SAE, view: StoreView, rows: NDArray[np.int64], *, batch_tokens: int = 16_384
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]]:
    """Yields (flat [n], top_acts [n, k], top_indices [n, k]) for the view's tokens in `rows`, some whole rows at a time.

    Raises:
        NonFiniteError: the dictionary yields NaN or Inf; the first such token is named.
    """
    context_len = view.store.context_len
    num_rows = max(1, batch_tokens // context_len)
    device = sae.W_enc.device
    for start in range(0, len(rows), num_rows):
        batch = rows[start : start + num_rows]
        mask = np.asarray(view.mask[batch])
        x = view.store.read_rows(batch)[torch.from_numpy(mask)].to(device, torch.float32)  # [n, D]
        with torch.no_grad():
            top_acts, top_indices = token_code(sae, x)
        acts = top_acts.float().cpu().numpy()
        row, position = np.nonzero(mask)
        flat = batch[row] * context_len + position
        if not np.isfinite(acts).all():
            worst = int(flat[np.flatnonzero(~np.isfinite(acts).all(axis=1))[0]])
            raise NonFiniteError(
                f"contexts: NaN or Inf in the dictionary's activations at row {worst // context_len}, "
                f"position {worst % context_len}, needs finite numbers; check the weights and the store"
            )
        yield flat, acts, top_indices.cpu().numpy().astype(np.int64, copy=False)


class _Collector:
    """The running state of the pass."""

    def __init__(self, num_features: int, view: StoreView, config: ContextConfig, *, scale: float) -> None:
        self.config = config
        self.num_features = num_features
        self.context_len = view.store.context_len
        self.documents = np.asarray(view.store.documents()).reshape(-1)
        octaves = np.arange(-NUM_BINS, 1) / BINS_PER_OCTAVE
        self.edges = (scale * 2.0**octaves).astype(np.float32)
        self.firing_count = np.zeros(num_features, dtype=np.int64)
        self.sum_act = np.zeros(num_features, dtype=np.float64)
        self.max_act = np.zeros(num_features, dtype=np.float32)
        self.histogram = np.zeros((num_features, NUM_BINS), dtype=np.int32)
        width = config.window
        self.top = Reservoir(num_features, config.num_top, width=width, scale=scale, dtype=np.float32)
        self.sample = Reservoir(
            num_features * NUM_BINS, config.num_per_stratum, width=width, scale=scale, dtype=np.uint64
        )
        self.is_code_row = draw_rows(view, num_tokens=config.num_code_tokens, seed=config.seed)
        self.code_tokens: list[NDArray[np.int64]] = []
        self.code_parts: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]] = []

    def add(self, flat: NDArray[np.int64], acts: NDArray[np.float32], indices: NDArray[np.int64]) -> None:
        """Takes in the codes of some whole rows: `flat` [n], `acts` and `indices` [n, k]."""
        token, place = np.nonzero(acts > 0)
        values, features = acts[token, place], indices[token, place]
        self._keep_codes(flat, token, features, values)
        events = Events(features, flat[token], values, context_len=self.context_len)
        if not len(events):
            return
        starts = np.flatnonzero(np.diff(events.features, prepend=-1))
        present = events.features[starts]
        self.firing_count[present] += np.diff(starts, append=len(events))
        self.sum_act[present] += np.add.reduceat(events.acts.astype(np.float64), starts)
        self.max_act[present] = np.maximum(self.max_act[present], np.maximum.reduceat(events.acts, starts))
        stratum = np.clip(np.searchsorted(self.edges, events.acts, side="right") - 1, 0, NUM_BINS - 1)
        groups = events.features * NUM_BINS + stratum
        self.histogram += (
            np.bincount(groups, minlength=self.histogram.size).reshape(self.histogram.shape).astype(np.int32)
        )
        self.top.offer(events, events.features, -events.acts, documents=self.documents[events.flat].astype(np.int64))
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
        counts, features, values = (np.concatenate(parts) for parts in zip(*self.code_parts, strict=True))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return {"tokens": np.concatenate(self.code_tokens), "offsets": offsets, "indices": features, "acts": values}

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Returns the arrays of a `FeatureContexts`."""
        sample_shape = (self.num_features, NUM_BINS * self.config.num_per_stratum)
        flat = self.sample.flat.reshape(sample_shape)
        # Each feature fills its own few bins: move the used slots to the left and cut the common rest.
        order = np.argsort(flat < 0, axis=1, kind="stable")
        order = order[:, : max(1, int((flat >= 0).sum(axis=1).max()))]
        slot = np.take_along_axis(flat, order, axis=1)
        windows = self.sample.windows.reshape(*sample_shape, self.config.window)
        stratum = np.where(slot >= 0, order // self.config.num_per_stratum, -1)
        used = self.firing_count > 0
        return {
            **self._places("top", self.top.flat, self.top.acts, self.top.windows),
            **self._places(
                "sample",
                slot,
                np.take_along_axis(self.sample.acts.reshape(sample_shape), order, axis=1),
                np.take_along_axis(windows, order[:, :, None], axis=1),
            ),
            "sample_stratum": stratum.astype(np.int32),
            "firing_count": self.firing_count,
            "max_act": self.max_act,
            "mean_act": np.divide(self.sum_act, self.firing_count, out=np.zeros_like(self.sum_act), where=used).astype(
                np.float32
            ),
            "histogram": self.histogram,
            "histogram_edges": self.edges,
        }

    def _places(
        self, name: str, flat: NDArray[np.int64], acts: NDArray[np.float32], windows: NDArray[np.float16]
    ) -> dict[str, NDArray[np.generic]]:
        used = flat >= 0
        largest = np.where(self.max_act > 0, self.max_act, 1)[:, None, None]
        levels = np.rint(windows.astype(np.float32) * (255 * self.top.scale / largest))
        return {
            f"{name}_row": np.where(used, flat // self.context_len, -1).astype(np.int32),
            f"{name}_position": np.where(used, flat % self.context_len, -1).astype(np.int32),
            f"{name}_act": np.where(used, acts, 0).astype(np.float32),
            f"{name}_window": np.where(used[:, :, None], np.clip(levels, 0, 255), 0).astype(np.uint8),
        }


def draw_rows(view: StoreView, *, num_tokens: int, seed: int) -> NDArray[np.bool_]:
    """Returns a mask [R] of whole rows, drawn by hash until they hold `num_tokens` of the view's tokens, or all of them."""
    rows = np.asarray(view.rows(), dtype=np.int64)
    order = np.argsort(hash_events(np.full_like(rows, -1), rows, seed=seed), kind="stable")
    tokens = np.cumsum(np.asarray(view.mask[rows]).sum(axis=1)[order])
    needed = int(np.searchsorted(tokens, num_tokens)) + 1
    chosen = np.zeros(view.store.num_rows, dtype=bool)
    chosen[rows[order[:needed]]] = True
    return chosen


def _largest_expected(sae: SAE, view: StoreView) -> float:
    """Returns a round upper scale for activations: twice the mean distance from the mean, in units of decoder rows.

    Of a transcoder that is the distance of what it predicts; of several hook points that of normalised ones.
    """
    store = view.store.targets if isinstance(view.store, PairedStore) else view.store
    rows = (sae.normalized_decoder() if isinstance(sae, Crosscoder) else sae.W_dec).detach().float()
    # Each hook point of a crosscoder has its part of a row.
    width = math.sqrt(rows.shape[1]) if isinstance(sae, SitesSAE) else float(store.statistics.mean_norm_centred)
    decoder_norm = float(torch.linalg.vector_norm(rows, dim=1).median())
    scale = 2 * width / (decoder_norm if decoder_norm > 0 else 1.0)
    return float(2.0 ** np.ceil(np.log2(scale))) if np.isfinite(scale) and scale > 0 else 1.0


def sae_fingerprint(sae: SAE) -> str:
    """Returns the sha256 of a dictionary's config and weights."""
    digest = hashlib.sha256(repr(sorted(sae.cfg.to_dict().items())).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).data)
    return digest.hexdigest()
