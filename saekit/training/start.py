"""What is measured on the first training tokens, before the first step."""

import torch
from torch import Tensor

from saekit.activations.source import ActivationSource, lasting
from saekit.errors import NonFiniteError
from saekit.sae.base import SAE, SAEConfig
from saekit.sae.batch import num_samples, split_batch
from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.fold import AnyNormalization, Normalization, PairNormalization, SiteNormalization
from saekit.sae.gated import GatedSAE
from saekit.sae.jumprelu import JumpReLUSAE
from saekit.sae.mlsae import MLSAE
from saekit.sae.relu import ReLUSAE
from saekit.sae.sites import SitesSAE
from saekit.sae.transcoder import Transcoder
from saekit.training.config import SparsityConfig
from saekit.training.layout import Layout
from saekit.training.sharded import forward_over
from saekit.training.sparsity import init_shared_threshold, init_thresholds

__all__ = [
    "SAMPLE_TOKENS",
    "estimate_normalization",
    "estimate_pair_normalization",
    "estimate_site_normalization",
    "fit_start",
    "init_transcoder",
    "normalization_of",
    "read_sample",
    "scale_encoder",
]

SAMPLE_TOKENS = 32_768
"""Enough for a mean that is wrong by half a percent of the spread, small enough to hold at any width."""

PART_TOKENS = 2048


def read_sample(source: ActivationSource, num_tokens: int, layout: Layout | None = None) -> Tensor:
    """Returns at least `num_tokens` tokens [n, d_in] from the source's present position, and moves it back there.

    Of a source whose activations do not stay, they are those that do.

    They are those of all processes, batch after batch as a single process reads them: what is measured on them is the same bits
    however batches are shared.
    """
    layout = layout or Layout.alone()
    batches: list[Tensor] = []
    count = 0
    with lasting(source) as read:
        position = read.state_dict()
        while count < num_tokens:
            batches += layout.data.gather_rows(read.next_batch().to(layout.device), "start")
            count = sum(len(batch) for batch in batches)
        read.load_state_dict(position)
    return torch.cat(batches)


def estimate_normalization(sample: Tensor) -> Normalization:
    """Returns the normalisation measured on a sample [n, d_in].

    Raises:
        NonFiniteError: the sample has NaN or Inf, or its activations are all equal.
    """
    finite = torch.isfinite(sample).all(dim=1)
    if not bool(finite.all()):
        raise NonFiniteError(
            f"training data: {int((~finite).sum())} of the first {len(sample)} activations have NaN or Inf, "
            f"needs finite ones; verify the activation cache"
        )
    mean = sample.sum(0, dtype=torch.float64) / len(sample)
    centred = sample.double() - mean
    moments = torch.stack([centred.norm(dim=1).sum(), centred.square().sum()])
    mean_norm, mean_square = (moments / len(sample)).tolist()
    return Normalization.from_moments(mean, mean_norm_centred=mean_norm, mean_square_centred=mean_square)


@torch.no_grad()
def scale_encoder(sae: SAE, x: Tensor, layout: Layout | None = None, cfg: SAEConfig | None = None) -> float:
    """Scales encoder and thresholds so that the first reconstruction of x [n, d_in] is the best multiple of itself.

    For a transcoder, x are pairs [n, d_in + d_out] and the multiple is the best one of the prediction.

    Many overlapping features add up to more than the input: with unit encoder rows the first hundred steps would be spent on
    shrinking all of them, and a JumpReLU SAE would lose most of its active features on the way.

    Args:
        sae: or this process's part of it.
        x: normalised activations, the same on every process.
        layout: which processes hold the other features; None = none does.
        cfg: of the whole SAE; None = that of `sae`.

    Returns:
        The factor.
    """
    layout, cfg = layout or Layout.alone(x.device), cfg or sae.cfg
    moments = torch.zeros(2, dtype=torch.float64, device=x.device)
    for part in torch.split(x, PART_TOKENS):
        inputs, target = split_batch(sae, part)
        x_hat = forward_over(layout, cfg, sae, inputs).x_hat.double().reshape(target.shape)
        moments += torch.stack([(x_hat * target).sum(), x_hat.square().sum()])
    along, square = moments.tolist()
    if along <= 0 or square <= 0:
        return 1.0
    sae.W_enc.mul_(along / square)
    sae.b_enc.mul_(along / square)
    sae.scale_thresholds(along / square)
    return float(along / square)


def estimate_pair_normalization(sample: Tensor, d_in: int) -> PairNormalization:
    """Returns the normalisations of the first `d_in` columns and of the others, measured on a sample [n, d_in + d_out].

    Raises:
        NonFiniteError: see `estimate_normalization`.
    """
    return PairNormalization(
        inputs=estimate_normalization(sample[:, :d_in]),
        targets=estimate_normalization(sample[:, d_in:]),
    )


def estimate_site_normalization(sample: Tensor, sae: SitesSAE) -> SiteNormalization:
    """Returns the normalisation of each of the dictionary's hook points, measured on a sample [n, S * d_in].

    Raises:
        NonFiniteError: see `estimate_normalization`.
    """
    if isinstance(sae, MLSAE) and not sae.cfg.is_normalized_per_site:
        shared = estimate_normalization(sample.reshape(-1, sae.d_in))
        return SiteNormalization(sites=(shared,) * sae.num_sites, total_variance=shared.total_variance)
    sites = tuple(estimate_normalization(part) for part in torch.split(sample, sae.d_in, dim=1))
    total = sum(site.total_variance for site in sites)
    return SiteNormalization(sites=sites, total_variance=total / num_samples(sae))


def normalization_of(sample: Tensor, sae: SAE) -> AnyNormalization:
    """Returns the normalisation that the SAE's architecture is trained with, measured on a sample [n, batch_width(sae)].

    Raises:
        NonFiniteError: see `estimate_normalization`.
    """
    if isinstance(sae, Transcoder):
        return estimate_pair_normalization(sample, sae.d_in)
    if isinstance(sae, SitesSAE):
        return estimate_site_normalization(sample, sae)
    return estimate_normalization(sample)


@torch.no_grad()
def init_transcoder(sae: Transcoder, pairs: Tensor, layout: Layout, cfg: SAEConfig) -> None:
    """Sets each decoder row to the direction of the predicted activations on the tokens where its feature is active.

    Random rows would have to turn before they predict anything; a feature that is never active on the sample keeps its own.

    Args:
        sae: with random encoder directions, or this process's part of one.
        pairs: normalised [n, d_in + d_out].
        layout: which processes hold the other features.
        cfg: of the whole transcoder.
    """
    sums = torch.zeros_like(sae.W_dec)
    for part in torch.split(pairs, PART_TOKENS):
        inputs, target = split_batch(sae, part)
        _, acts, indices = forward_over(layout, cfg, sae, inputs)
        for place in range(acts.shape[1]):
            sums.index_add_(0, indices[:, place], acts[:, place, None] * target)
    has_any = sums.norm(dim=1) > 0
    sae.W_dec[has_any] = sums[has_any]
    sae.normalize_decoder()


@torch.no_grad()
def fit_start(
    sae: SAE, x: Tensor, sparsity: SparsityConfig, layout: Layout | None = None, cfg: SAEConfig | None = None
) -> None:
    """Adapts random weights to normalised activations x: first the thresholds' start, then the encoder's scale.

    Args:
        sae: or this process's part of it.
        x: the same on every process.
        sparsity: what the L0 starts at.
        layout: which processes hold the other features; None = none does.
        cfg: of the whole SAE; None = that of `sae`.
    """
    layout, cfg = layout or Layout.alone(x.device), cfg or sae.cfg
    if isinstance(sae, JumpReLUSAE | ReLUSAE | GatedSAE):
        assert sae.cfg.target_l0 is not None
        init_thresholds(sae, x, sae.cfg.target_l0 * sparsity.start_factor / cfg.d_sae)
    elif isinstance(sae, BatchTopKSAE):
        init_shared_threshold(sae, x, layout, cfg)
    elif isinstance(sae, Transcoder):
        init_transcoder(sae, x, layout, cfg)
    scale_encoder(sae, x, layout, cfg)
