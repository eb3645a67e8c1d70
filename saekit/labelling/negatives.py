"""Near negatives: texts on which a feature's siblings fire most and it does not fire at all."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray

from saekit.activations import StoreView
from saekit.errors import ConfigError
from saekit.labelling.collect import encoded_rows
from saekit.labelling.contexts import Context, FeatureContexts
from saekit.sae import SAE

__all__ = ["near_negatives", "sibling_features"]

CANDIDATES_PER_NEGATIVE = 4
"""Contexts of siblings that are looked at for one that is wanted."""
CHUNK = 256


def sibling_features(sae: SAE, features: Sequence[int], *, num: int) -> NDArray[np.int64]:
    """Returns the `num` features whose decoder rows are most alike each feature's, nearest first [n, num].

    Raises:
        ConfigError: the dictionary has no more than `num` features.
    """
    if num >= sae.cfg.d_sae:
        raise ConfigError(f"siblings: {num} of each feature, the dictionary has {sae.cfg.d_sae}; ask for fewer")
    found = []
    with torch.no_grad():
        rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
        for chunk in torch.split(torch.as_tensor(list(features), dtype=torch.int64, device=rows.device), CHUNK):
            alike = rows[chunk] @ rows.T  # [n, F]
            alike[torch.arange(len(chunk), device=rows.device), chunk] = -torch.inf
            found.append(alike.topk(num, dim=1).indices.cpu().numpy())
    return np.concatenate(found) if found else np.empty((0, num), dtype=np.int64)


def near_negatives(
    sae: SAE,
    view: StoreView,
    contexts: FeatureContexts,
    features: Sequence[int],
    *,
    num: int,
    num_siblings: int = 8,
) -> dict[int, list[Context]]:
    """Returns, for each feature, up to `num` peaks of its siblings in rows where the feature is silent on every token.

    Siblings take turns, the nearest first, each from its strongest context on. Silence is checked by encoding those rows.

    Args:
        view: the documents that `contexts` were collected from.
        num_siblings: features whose contexts are drawn on.

    Raises:
        ConfigError: the dictionary has no more than `num_siblings` features.
    """
    siblings = sibling_features(sae, features, num=num_siblings)
    candidates = {
        feature: _in_turns(contexts, own.tolist())[: CANDIDATES_PER_NEGATIVE * num]
        for feature, own in zip(features, siblings, strict=True)
    }
    rows = np.unique([context.row for found in candidates.values() for context in found]).astype(np.int64)
    firing = _firing_pairs(sae, view, rows)
    silent = np.zeros(contexts.window, dtype=np.uint8)
    return {
        feature: [
            Context(row=context.row, position=context.position, act=0.0, window=silent)
            for context in found
            if context.row * sae.cfg.d_sae + feature not in firing
        ][:num]
        for feature, found in candidates.items()
    }


def _in_turns(contexts: FeatureContexts, siblings: Sequence[int]) -> list[Context]:
    """Returns the siblings' top contexts, one of each in turn, no row twice."""
    first: dict[int, Context] = {}
    for turn in zip_longest(*(contexts.feature(sibling) for sibling in siblings)):
        for context in turn:
            if context is not None:
                first.setdefault(context.row, context)
    return list(first.values())


def _firing_pairs(sae: SAE, view: StoreView, rows: NDArray[np.int64]) -> set[int]:
    """Returns row * F + feature of every firing in `rows`."""
    pairs: set[int] = set()
    for flat, acts, indices in encoded_rows(sae, view, rows):
        token, place = np.nonzero(acts > 0)
        keys = flat[token] // view.store.context_len * sae.cfg.d_sae + indices[token, place]
        pairs.update(np.unique(keys).tolist())
    return pairs
