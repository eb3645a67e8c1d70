"""One streaming pass over the training documents that finds where each feature fires; memory grows with features only."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from saekit.activations import PairedStore, StoreView
from saekit.errors import ConfigError, DataError, NonFiniteError
from saekit.labelling.collector import ContextCollector, ContextConfig
from saekit.labelling.contexts import CODES_NAME, CONTEXTS_NAME, FeatureContexts
from saekit.labelling.reservoir import hash_events
from saekit.manifest import atomic_write, begin_stage, finish_stage
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE, Crosscoder, SitesSAE
from saekit.sae.batch import batch_width, token_code
from saekit.sae.identity import sae_sha256

__all__ = [
    "collect_contexts",
    "collect_contexts_part",
    "draw_rows",
    "encoded_rows",
    "sae_fingerprint",
]


def collect_contexts(
    sae: SAE,
    view: StoreView,
    *,
    config: ContextConfig,
    out: str | Path,
    num_parts: int = 1,
    progress: Progress = NO_PROGRESS,
) -> FeatureContexts:
    """Returns the contexts of all features over the tokens of `view`, from `out` if a former pass finished there.

    Args:
        sae: any dictionary with `encode_sparse`. Of a multi-layer SAE a token has each feature's largest activation over hook
            points.
        view: the training documents; other tokens of their rows count as silent.
        config: what to keep.
        out: folder for contexts.safetensors, codes.safetensors and the manifest; a pass that was killed goes on from what it
            last wrote there.
        num_parts: take the pass in so many parts, those that `collect_contexts_part` has done included; the result is the same.
        progress: told of tokens.

    Raises:
        ConfigError: `out` was written with another config, dictionary or other documents.
        DataError: the view has no tokens, or another width than the dictionary.
        NonFiniteError: the dictionary yields NaN or Inf.
    """
    out = Path(out)
    if _begin(sae, view, config, out) == "complete":
        return FeatureContexts.open(out)
    scale = _largest_expected(sae, view)
    collector: ContextCollector | None = None
    for part in range(num_parts):
        found = _collect_part(sae, view, config, out, part, num_parts, scale, progress)
        if collector is None:
            collector = found
        else:
            collector.merge(found)
    assert collector is not None, "num_parts is at least one"
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
    for part in range(num_parts):
        _part_path(out, part, num_parts).unlink(missing_ok=True)
    progress.say(f"contexts: {sae.cfg.d_sae - silent} of {sae.cfg.d_sae} features fire on {view.num_tokens} tokens")
    return FeatureContexts.open(out)


def collect_contexts_part(
    sae: SAE,
    view: StoreView,
    *,
    config: ContextConfig,
    out: str | Path,
    part: int,
    num_parts: int,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Does one of `num_parts` parts of the pass and leaves it in `out`, where `collect_contexts` finds it.

    Parts may be done by several processes at a time, each its own; a part that was broken off goes on where it was last written.

    Raises:
        ConfigError: there is no such part; else as `collect_contexts`.
    """
    if not 0 <= part < num_parts:
        raise ConfigError(f"contexts: part {part} of {num_parts}, needs one of 0 to {num_parts - 1}")
    out = Path(out)
    if _begin(sae, view, config, out) != "complete":
        _collect_part(sae, view, config, out, part, num_parts, _largest_expected(sae, view), progress)


def _begin(sae: SAE, view: StoreView, config: ContextConfig, out: Path) -> str:
    """Checks the inputs and claims the folder; returns what `begin_stage` does."""
    if view.d_in != batch_width(sae):
        raise DataError(f"contexts: activations are {view.d_in} wide, the dictionary needs {batch_width(sae)}")
    if view.num_tokens == 0:
        raise DataError("contexts: the training view has no tokens, needs at least one")
    # How many tokens go at a time is no property of the result, so a resumed run may choose another number.
    values = {key: value for key, value in config.to_dict().items() if key not in _OPERATIONAL}
    inputs = {"cache": view.store.sha256, "documents": view.fingerprint, "sae": sae_fingerprint(sae)}
    return begin_stage(out, "contexts", values, inputs)


def _part_path(out: Path, part: int, num_parts: int) -> Path:
    return out / f"part-{part:05d}-of-{num_parts:05d}.safetensors"


def _collect_part(
    sae: SAE,
    view: StoreView,
    config: ContextConfig,
    out: Path,
    part: int,
    num_parts: int,
    scale: float,
    progress: Progress,
) -> ContextCollector:
    """Returns what the part's rows hold, from the disk as far as it is there."""
    is_code_row = draw_rows(view, num_tokens=config.num_code_tokens, seed=config.seed)
    collector = ContextCollector(sae.cfg.d_sae, view, config, scale=scale, is_code_row=is_code_row)
    path = _part_path(out, part, num_parts)
    if path.exists():
        collector.load(path)
    rows = np.array_split(np.asarray(view.rows(), dtype=np.int64), num_parts)[part]
    sizes = np.asarray(view.mask[rows]).sum(axis=1)
    done, total = int(sizes[: collector.rows_done].sum()), int(sizes.sum())
    written = time.monotonic()
    with progress.task("contexts", total, "tokens", done=done) as task:
        left = rows[collector.rows_done :]
        for flat, acts, indices in encoded_rows(sae, view, left, batch_tokens=config.batch_tokens):
            collector.add(flat, acts, indices)
            collector.rows_done = int(np.searchsorted(rows, flat[-1] // view.store.context_len, side="right"))
            task.advance(len(flat))
            is_last = collector.rows_done == len(rows)
            # A pass in one part is written at its end anyway.
            if time.monotonic() - written >= config.checkpoint_seconds or (is_last and num_parts > 1):
                collector.save(path)
                written = time.monotonic()
    return collector


_OPERATIONAL = {"batch_tokens", "checkpoint_seconds"}


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
    return sae_sha256(sae, repr(sorted(sae.cfg.to_dict().items())))
