"""Figures of the SAE in training on tokens that it is not trained on."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from saekit_kernels import decode, encode_batch_topk
from torch import Tensor

from saekit.sae.base import SAE, SAEOutput
from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.fold import Normalization, PairNormalization
from saekit.sae.rows import ActiveRows
from saekit.sae.transcoder import split_pairs

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
    l0: float
    dead_fraction: float


def read_evenly(view: TokenView, num_tokens: int) -> Tensor:
    """Returns about `num_tokens` activations [n, d_in], in blocks spread evenly over the view; all when it has fewer."""
    indices = view.indices
    blocks = [indices[start : start + BLOCK_TOKENS] for start in range(0, len(indices), BLOCK_TOKENS)]
    wanted = max(1, min(len(blocks), num_tokens // BLOCK_TOKENS))
    kept = [blocks[round(place)] for place in np.linspace(0, len(blocks) - 1, wanted)] if blocks else []
    return view.read(np.concatenate(kept)) if kept else torch.empty(0, view.d_in)


def heldout_figures(
    sae: SAE, x: Tensor, normalization: Normalization | PairNormalization | None = None
) -> dict[str, float]:
    """Returns the figures of `evaluate_heldout` by name.

    A BatchTopK SAE has two rules of what is active: `fvu_training` and `l0_training` are those of the training's, which keeps the
    N * k largest entries of a batch; the others are those of the threshold that holds at inference.
    """
    figures = evaluate_heldout(sae, x, normalization)._asdict()
    if not isinstance(sae, BatchTopKSAE):
        return figures
    found = evaluate_heldout(sae, x, normalization, forward=partial(_as_trained, sae))
    return figures | {"fvu_training": found.fvu, "l0_training": found.l0}


def _as_trained(sae: BatchTopKSAE, x: Tensor) -> SAEOutput:
    """Encodes and reconstructs x [N, d_in] with the N * k largest entries of the batch."""
    rows = ActiveRows(*encode_batch_topk(sae.encoder_input(x), sae.W_enc, sae.b_enc, sae.cfg.k))
    x_hat = decode(rows.acts, rows.indices, sae.W_dec, sae.b_dec, offsets=rows.offsets)
    return SAEOutput(x_hat, *rows.padded())


@torch.no_grad()
def evaluate_heldout(
    sae: SAE,
    x: Tensor,
    normalization: Normalization | PairNormalization | None = None,
    *,
    batch_size: int = 2048,
    forward: Callable[[Tensor], SAEOutput] | None = None,
) -> HeldOutFigures:
    """Returns figures of an SAE with its inference nonlinearity on raw activations x [n, d_in].

    Args:
        sae: of raw activations, or of normalised ones where `normalization` is given.
        x: held-out tokens; pairs for a transcoder, whose figures are those of what it predicts.
        normalization: applied to `x` first; changes none of the figures' meaning, as FVU does not depend on it.
        batch_size: tokens at a time.
        forward: what encodes and reconstructs; None = the SAE itself.

    FVU is 1 - (explained variance): sum ||x - x_hat||^2 / sum ||x - mean of x||^2, sums over all tokens in float64.
    """
    squared_error = squared = num_active = 0.0
    total = torch.zeros(sae.d_out, dtype=torch.float64, device=sae.b_dec.device)
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.b_dec.device)
    for batch in torch.split(x, batch_size):
        normal = batch.to(sae.b_dec)
        if normalization is not None:
            normal = normalization.apply(normal)
        inputs, target = split_pairs(sae, normal)
        x_hat, top_acts, top_indices = (forward or sae)(inputs)
        squared_error += float((target - x_hat).double().square().sum())
        squared += float(target.double().square().sum())
        total += target.double().sum(0)
        num_active += float((top_acts > 0).sum())
        fired[top_indices[top_acts > 0]] = True
    variance = squared - float(total.square().sum()) / len(x)
    return HeldOutFigures(squared_error / variance, num_active / len(x), 1.0 - float(fired.double().mean()))
