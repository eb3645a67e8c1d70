"""BatchTopK: a batch keeps its N * k largest pre-activations, so a token uses as many features as it needs."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from saekit_kernels import encode_topk
from torch import Tensor, nn

from saekit.sae.threshold import ThresholdSAE
from saekit.sae.topk import KConfig

__all__ = ["BatchTopKConfig", "BatchTopKSAE", "encode_batch_topk"]


class BatchTopKConfig(KConfig):
    """A BatchTopK SAE."""

    kind: Literal["batchtopk"] = "batchtopk"
    """Architecture."""


class BatchTopKSAE(ThresholdSAE):
    """`z * (z > threshold)` with one threshold for all features, so that a token does not depend on its batch.

    Training keeps the N * k largest entries of each batch; the threshold is the running mean of the smallest one kept.

    Attributes:
        threshold: [1] float32, in units of raw activations.

    Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders", section 3.
    """

    cfg: KConfig

    def __init__(
        self,
        cfg: KConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an SAE with tied random directions and a threshold of 0: every positive pre-activation is active."""
        super().__init__(cfg, seed=seed, hook_point=hook_point, source=source, dtype=dtype)
        self.threshold = nn.Parameter(
            torch.zeros(1, dtype=torch.promote_types(dtype, torch.float32)), requires_grad=False
        )


class BatchCode(NamedTuple):
    """The kept entries of a batch as rows of varying length."""

    values: Tensor
    """[nnz], > 0, with a graph to the encoder."""
    indices: Tensor
    """[nnz] int64, the feature of each entry."""
    offsets: Tensor
    """[N + 1] int64, where each token's entries begin."""


def encode_batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> BatchCode:
    """Returns the N * k largest positive entries of `x @ W_enc + b_enc` over the whole batch; fewer where fewer are positive.

    Exact: each token brings its largest few entries as candidates, and where all candidates of a token are kept, one that was
    not brought might belong as well, so the search is repeated with twice as many.

    Args:
        x: [N, d_in].
        W_enc: [d_in, d_sae].
        b_enc: [d_sae].
        k: entries a token on average.
    """
    d_sae = W_enc.shape[1]
    candidates = min(4 * k, d_sae)
    while True:
        values, indices = encode_topk(x, W_enc, b_enc, candidates)
        kept = torch.zeros_like(values, dtype=torch.bool)
        num_kept = min(len(x) * k, values.numel())
        kept.view(-1)[torch.topk(values.detach().flatten(), num_kept, sorted=False).indices] = True
        kept &= values > 0
        if candidates == d_sae or not bool(kept.all(dim=1).any()):
            break
        candidates = min(2 * candidates, d_sae)
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(kept.sum(dim=1), dim=0, out=offsets[1:])
    return BatchCode(values[kept], indices[kept], offsets)
