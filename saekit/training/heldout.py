"""Figures of the SAE in training on tokens that it is not trained on."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.sae.base import SAE, SAEConfig, SAEOutput
from saekit.sae.batch import num_samples, num_targets, split_batch
from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.fold import AnyNormalization
from saekit.training.layout import Layout
from saekit.training.sharded import forward_as_trained, forward_over

__all__ = ["HeldOutFigures", "TokenView", "evaluate_heldout", "heldout_figures", "read_evenly"]

BLOCK_TOKENS = 256


class TokenView(Protocol):
    """Some tokens of an activation store, e.g. a `StoreView`."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""

    @property
    def indices(self) -> NDArray[np.int64]:
        """The tokens, in order."""

    def read(self, indices: NDArray[np.int64], /) -> Tensor:
        """Returns activations [n, d_in]."""


class HeldOutFigures(NamedTuple):
    """FVU pooled over tokens, mean L0, and the part of features that never fired."""

    fvu: float
    """Mean over hook points where several are reconstructed."""
    l0: float
    """Of a sample: of a token, or of one hook point's activation where each has a code of its own."""
    dead_fraction: float
    fvu_by_site: tuple[float, ...] = ()
    """Of each hook point, where several are reconstructed."""
    l0_by_site: tuple[float, ...] = ()
    """Of each hook point, where each has a code of its own."""

    def figures(self) -> dict[str, object]:
        """Returns the figures that there are, as JSON values."""
        values = self._asdict().items()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values if value != ()}


def read_evenly(view: TokenView, num_tokens: int) -> Tensor:
    """Returns about `num_tokens` activations [n, d_in], in blocks spread evenly over the view; all when it has fewer."""
    indices = view.indices
    blocks = [indices[start : start + BLOCK_TOKENS] for start in range(0, len(indices), BLOCK_TOKENS)]
    wanted = max(1, min(len(blocks), num_tokens // BLOCK_TOKENS))
    kept = [blocks[round(place)] for place in np.linspace(0, len(blocks) - 1, wanted)] if blocks else []
    return view.read(np.concatenate(kept)) if kept else torch.empty(0, view.d_in)


def heldout_figures(
    sae: SAE,
    x: Tensor,
    normalization: AnyNormalization | None = None,
    *,
    layout: Layout | None = None,
    cfg: SAEConfig | None = None,
) -> dict[str, object]:
    """Returns the figures of `evaluate_heldout` by name.

    A BatchTopK SAE has two rules of what is active: `fvu_training` and `l0_training` are those of the training's, which keeps the
    N * k largest entries of a batch; the others are those of the threshold that holds at inference.
    """
    layout, cfg = layout or Layout.alone(sae.b_dec.device), cfg or sae.cfg
    figures = evaluate_heldout(sae, x, normalization, layout=layout, cfg=cfg).figures()
    if not isinstance(sae, BatchTopKSAE):
        return figures
    forward = partial(forward_as_trained, layout, cfg, sae)
    found = evaluate_heldout(sae, x, normalization, layout=layout, cfg=cfg, forward=forward)
    return figures | {"fvu_training": found.fvu, "l0_training": found.l0}


@torch.no_grad()
def evaluate_heldout(
    sae: SAE,
    x: Tensor,
    normalization: AnyNormalization | None = None,
    *,
    batch_size: int = 2048,
    layout: Layout | None = None,
    cfg: SAEConfig | None = None,
    forward: Callable[[Tensor], SAEOutput] | None = None,
) -> HeldOutFigures:
    """Returns figures of an SAE with its inference nonlinearity on raw activations x [n, d_in].

    Args:
        sae: of raw activations, or of normalised ones where `normalization` is given.
        x: held-out tokens as in training; a transcoder's figures are those of what it predicts.
        normalization: applied to `x` first; changes none of the figures' meaning, as FVU does not depend on it.
        batch_size: tokens at a time.
        layout: which processes hold the other features, of the same tokens; None = none does.
        cfg: of the whole SAE; None = that of `sae`.
        forward: what encodes and reconstructs; None = the SAE itself.

    FVU is 1 - (explained variance): sum ||x - x_hat||^2 / sum ||x - mean of x||^2, sums over all tokens in float64.
    """
    layout, cfg = layout or Layout.alone(sae.b_dec.device), cfg or sae.cfg
    forward = forward or partial(forward_over, layout, cfg, sae)
    sites, device = num_targets(sae), sae.b_dec.device
    squared_error, squared = (torch.zeros(sites, dtype=torch.float64, device=device) for _ in range(2))
    total = torch.zeros(sites, sae.d_out, dtype=torch.float64, device=device)
    num_active = torch.zeros(num_samples(sae), dtype=torch.float64, device=device)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=device)
    for batch in torch.split(x, batch_size):
        normal = batch.to(sae.b_dec)
        if normalization is not None:
            normal = normalization.apply(normal)
        inputs, target = split_batch(sae, normal)
        x_hat, top_acts, top_indices = forward(inputs)
        wide = target.double().reshape(-1, sites, sae.d_out)
        squared_error += (target - x_hat.reshape(target.shape)).double().reshape(wide.shape).square().sum((0, 2))
        squared += wide.square().sum((0, 2))
        total += wide.sum(0)
        num_active += (top_acts > 0).sum(-1).reshape(len(batch), -1).sum(0)
        fired[top_indices[top_acts > 0]] = True
    fvu = squared_error / (squared - total.square().sum(1) / len(x))
    l0 = layout.latents.sum(num_active) / len(x)
    num_fired = float(layout.latents.sum(fired.sum(dtype=torch.float64)))
    return HeldOutFigures(
        fvu=float(fvu.mean()),
        l0=float(l0.mean()),
        dead_fraction=1.0 - num_fired / cfg.d_sae,
        fvu_by_site=tuple(fvu.tolist()) if sites > 1 else (),
        l0_by_site=tuple(l0.tolist()) if len(l0) > 1 else (),
    )
