"""Where features fire on probe sentences, and how near the others came.

Shapes: n tokens, D width, K active features of a token, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.activations import StoreView
from saekit.errors import NonFiniteError
from saekit.labelling.revival.probes import CONTROL, Probe
from saekit.labelling.revival.record import Revival
from saekit.progress import NO_PROGRESS, Progress
from saekit.sae import SAE, TopKSAE
from saekit.sae.batch import split_batch, token_code
from saekit.sae.mlsae import MLSAE
from saekit.sae.threshold import ThresholdSAE

__all__ = ["ProbeFirings", "find_firings", "firing_rule", "try_features"]

BATCH_TOKENS = 8192


def firing_rule(sae: SAE) -> str:
    """Returns when a feature of this dictionary fires on a token, and what `Revival.bar` is."""
    if isinstance(sae, MLSAE):
        return "a feature fires where its pre-activation is above 0 and among the token's k largest at any hook point; no bar"
    if isinstance(sae, TopKSAE):
        return (
            f"a feature fires where its pre-activation is above 0 and among the token's k = {sae.cfg.k} largest; "
            "bar: the k-th largest activation of that token"
        )
    if isinstance(sae, ThresholdSAE):
        return "a feature fires where its pre-activation is above its threshold; bar: that threshold"
    return "a feature fires where its activation is above 0; no bar"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFirings:
    """What the sentences did to the features that are tried."""

    acts: Mapping[tuple[int, int], float]
    """(feature, document) -> its largest activation in the sentence, where it fires."""
    nearest: Mapping[int, tuple[float, float]]
    """Feature -> (pre-activation, bar) at the token of its own sentences where it comes nearest, see `firing_rule`."""


def find_firings(
    sae: SAE, view: StoreView, features: Sequence[int], probes: Sequence[Probe], *, progress: Progress = NO_PROGRESS
) -> ProbeFirings:
    """Runs the dictionary over the sentences' activations.

    Args:
        view: whose documents are the sentences, in order.

    Raises:
        NonFiniteError: the dictionary yields NaN or Inf.
    """
    owner_of = np.array([probe.feature for probe in probes], dtype=np.int64)
    documents = view.store.documents().reshape(-1)
    is_tried = np.zeros(sae.cfg.d_sae, dtype=bool)
    is_tried[list(features)] = True
    acts: dict[tuple[int, int], float] = {}
    nearest: dict[int, tuple[float, float]] = {}
    with progress.task("probes", view.num_tokens, "tokens") as task:
        for x, flat in view.iter_batches(BATCH_TOKENS):
            document = documents[flat]
            with torch.no_grad():
                rows = x.to(sae.W_enc.device)
                top_acts, top_indices = token_code(sae, rows)
                _keep_nearest(nearest, owner_of[document], _margins(sae, rows, top_acts, owner_of[document]))
            values, which = top_acts.float().cpu().numpy(), top_indices.cpu().numpy()
            if not np.isfinite(values).all():
                raise NonFiniteError("revive: NaN or Inf in the dictionary's activations, needs finite numbers")
            token, slot = np.nonzero((values > 0) & is_tried[which])
            for key_feature, key_document, act in zip(
                which[token, slot].tolist(), document[token].tolist(), values[token, slot].tolist(), strict=True
            ):
                key = (key_feature, key_document)
                acts[key] = max(acts.get(key, 0.0), act)
            task.advance(len(flat))
    return ProbeFirings(acts=acts, nearest=nearest)


def _margins(sae: SAE, x: Tensor, top_acts: Tensor, owner: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Returns the pre-activation of each token's own feature and the bar that it has to pass [n, 2]; None without a bar."""
    has_bar = isinstance(sae, TopKSAE | ThresholdSAE) and not isinstance(sae, MLSAE)
    if not has_bar:
        return None
    own = torch.from_numpy(np.maximum(owner, 0)).to(x.device)
    u = sae.encoder_input(split_batch(sae, x)[0])
    pre = (u * sae.W_enc[:, own].T).sum(dim=1) + sae.b_enc[own]
    if isinstance(sae, ThresholdSAE):
        bar = sae.threshold.clamp_min(0).expand(sae.cfg.d_sae)[own]
    else:
        bar = top_acts.min(dim=1).values
    return torch.stack([pre.double(), bar.double()], dim=1).cpu().numpy()


def _keep_nearest(
    nearest: dict[int, tuple[float, float]], owner: NDArray[np.int64], margins: NDArray[np.float64] | None
) -> None:
    if margins is None:
        return
    order = np.argsort(margins[:, 0] - margins[:, 1], kind="stable")
    # Of each feature the last in this order is the best.
    best = dict(zip(owner[order].tolist(), order.tolist(), strict=True))
    for feature, place in best.items():
        pre, bar = margins[place].tolist()
        if feature >= 0 and (feature not in nearest or pre - bar > nearest[feature][0] - nearest[feature][1]):
            nearest[feature] = (pre, bar)


def try_features(
    features: Sequence[int],
    probes: Sequence[Probe],
    firings: ProbeFirings,
    *,
    promoted: Mapping[int, Sequence[str]],
    firings_before: Mapping[int, int],
) -> list[Revival]:
    """Returns what became of each feature, without its new labels."""
    own: dict[int, list[int]] = {feature: [] for feature in features}
    controls = [document for document, probe in enumerate(probes) if probe.source == CONTROL]
    for document, probe in enumerate(probes):
        if probe.feature in own:
            own[probe.feature].append(document)
    found = []
    for feature in features:
        awake = [document for document in own[feature] if (feature, document) in firings.acts]
        base = sum((feature, document) in firings.acts for document in controls)
        nearest = firings.nearest.get(feature)
        found.append(
            Revival(
                feature=feature,
                status="revived" if awake else "silent" if own[feature] else "no_probes",
                reason=None if awake else _why(len(own[feature]), nearest),
                firings_before=firings_before[feature],
                promoted=tuple(promoted[feature]),
                tried=len(own[feature]),
                fired=len(awake),
                tried_by_source=_by_source(probes, own[feature]),
                fired_by_source=_by_source(probes, awake),
                controls=len(controls),
                controls_fired=base,
                p_value=_fisher(len(awake), len(own[feature]), base, len(controls)) if own[feature] else None,
                max_act=max((firings.acts[feature, document] for document in awake), default=0.0),
                nearest=None if nearest is None else nearest[0],
                bar=None if nearest is None else nearest[1],
            )
        )
    return found


def _why(num_probes: int, nearest: tuple[float, float] | None) -> str:
    if not num_probes:
        return "no token that it promotes can be written, so there was nothing to try"
    came = (
        "" if nearest is None else f"; came nearest with a pre-activation of {nearest[0]:.3g}, needs {nearest[1]:.3g}"
    )
    return f"silent on all of its {num_probes} sentences{came}"


def _by_source(probes: Sequence[Probe], documents: Sequence[int]) -> dict[str, int]:
    sources = [probes[document].source for document in documents]
    return {source: sources.count(source) for source in dict.fromkeys(sources)}


def _fisher(fired: int, tried: int, base: int, controls: int) -> float:
    """Returns the probability of `fired` or more of `tried` if all firings fell on sentences and controls at random.

    Source: Fisher, Statistical Methods for Research Workers (1934), the exact test of a two by two table.
    """
    firings, total = fired + base, tried + controls
    ways = sum(comb(tried, n) * comb(controls, firings - n) for n in range(fired, min(tried, firings) + 1))
    return ways / comb(total, firings)
