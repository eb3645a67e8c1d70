"""What the rows of a training batch are for each architecture: which part is read, which is to be reconstructed."""

from torch import Tensor

from saekit.sae.base import SAE
from saekit.sae.mlsae import MLSAE
from saekit.sae.sites import SitesSAE

__all__ = ["batch_width", "num_samples", "num_targets", "split_batch", "token_code"]


def batch_width(sae: SAE) -> int:
    """Returns the width of a token's row: d_in; d_in + d_out of a transcoder's pair; of several hook points, side by side."""
    if sae.is_transcoder:
        return sae.d_in + sae.d_out
    return sae.num_sites * sae.d_in if isinstance(sae, SitesSAE) else sae.d_in


def num_samples(sae: SAE) -> int:
    """Returns how many codes a token has: one for each hook point of a multi-layer SAE, else one."""
    return sae.num_sites if isinstance(sae, MLSAE) else 1


def num_targets(sae: SAE) -> int:
    """Returns at how many hook points a token is reconstructed."""
    return sae.num_sites if isinstance(sae, SitesSAE) else 1


def split_batch(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what is read and what is to be reconstructed, of a batch [N, batch_width(sae)].

    Both are the batch itself but for transcoders, which read [N, d_in] and predict [N, d_out], and multi-layer SAEs, whose
    targets are samples of their own, [N * S, d_in].
    """
    if isinstance(sae, MLSAE):
        return x, x.reshape(-1, sae.d_in)
    if not sae.is_transcoder:
        return x, x
    inputs, target = x[:, : sae.d_in], x[:, sae.d_in :]
    # The kernels read rows; the halves of a pair are strided.
    return inputs.contiguous(), target


def token_code(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (acts [N, K], indices [N, K]) of a batch [N, batch_width(sae)], every feature at most once a token.

    Of a multi-layer SAE a token has, for each feature, the largest activation over hook points. Places not used hold 0 and 0.
    """
    acts, indices = sae.encode_sparse(split_batch(sae, x)[0])
    if not isinstance(sae, MLSAE):
        return acts, indices
    # By activation, then stably by feature: the first of equal neighbours is the largest.
    acts, order = acts.flatten(1).sort(dim=1, descending=True, stable=True)
    indices, by_feature = indices.flatten(1).gather(1, order).sort(dim=1, stable=True)
    acts = acts.gather(1, by_feature)
    acts[:, 1:][indices[:, 1:] == indices[:, :-1]] = 0
    return acts, indices.where(acts != 0, 0)
