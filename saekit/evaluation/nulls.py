"""Null rows: what no dictionary, a dense basis and an untrained dictionary score on the same tokens."""

import numpy as np
import torch
from torch import Tensor

from saekit.evaluation.reconstruction import Candidate, Int64Array, Reconstruction, TokenReader
from saekit.sae import (
    SAE,
    BatchTopKSAE,
    Dictionary,
    GatedSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    ReLUSAE,
    SAEConfig,
    TopKConfig,
    build_sae,
)
from saekit.sae.activation import GroupMax, TopK

__all__ = [
    "fit_sample",
    "linear_candidate",
    "mean_candidate",
    "measured_l0",
    "pca_candidate",
    "random_candidate",
    "sae_candidate",
]

# Pre-activations [n, F] of the threshold calibration: 64 MB of float32.
_CALIBRATION_ENTRIES = 16 * 2**20


def sae_candidate(sae: SAE, *, name: str = "sae", title: str = "SAE") -> Candidate:
    """Returns an SAE as a row, read and rebuilt by its sparse code."""

    def reconstruct(x: Tensor) -> Reconstruction:
        x_hat, top_acts, top_indices = sae(x)
        return Reconstruction(x_hat, top_acts, top_indices)

    return Candidate(name=name, title=title, reconstruct=reconstruct, num_features=sae.d_sae)


def mean_candidate(mean: Tensor) -> Candidate:
    """Returns the row that answers `mean` `[d_in]` for every token, in the dtype of `mean`."""
    return Candidate(name="mean", title="mean vector", reconstruct=lambda x: Reconstruction(mean.expand(len(x), -1)))


def fit_sample(read: TokenReader, flat: Int64Array, *, num_tokens: int, seed: int) -> Tensor:
    """Returns up to `num_tokens` of the tokens at `flat`, drawn without replacement, `[n, d_in]` float32."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(flat, size=min(num_tokens, len(flat)), replace=False)
    x = read(np.sort(chosen)).float()
    # The draws are in the store's order; calibration that takes the first rows must not see only the first documents.
    return x[torch.from_numpy(rng.permutation(len(x)))]


def measured_l0(sae: SAE, x: Tensor, *, batch_tokens: int) -> float:
    """Returns the mean number of active features over tokens `[n, d_in]`."""
    active = [int((sae.encode_sparse(part)[0] > 0).sum()) for part in torch.split(x, batch_tokens)]
    return sum(active) / len(x)


def pca_candidate(x: Tensor, num_components: int) -> Candidate:
    """Returns the projection on the first principal components of `x` `[n, d_in]`, fitted in float64."""
    num_components = min(num_components, x.shape[-1])
    mean = x.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for part in torch.split(x, 8192):
        centred = part.cpu().double() - mean.cpu()
        covariance += centred.T @ centred
    _, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -num_components:].float().to(x.device)  # [D, k], eigenvalues ascend
    centre = mean.float()

    def reconstruct(x: Tensor) -> Reconstruction:
        return Reconstruction(centre + ((x - centre) @ basis) @ basis.T)

    return Candidate(
        name="pca",
        title=f"PCA, {num_components} components",
        reconstruct=reconstruct,
        constant_l0=float(num_components),
    )


def linear_candidate(rows: Tensor, d_in: int) -> Candidate:
    """Returns the affine map from the first `d_in` columns of `rows` to the others that fits them best, in float64."""
    wide = rows.double()
    mean = wide.mean(dim=0)
    x, y = torch.split(wide - mean, [d_in, rows.shape[1] - d_in], dim=1)
    gram = x.T @ x
    # A millionth of the mean square keeps directions that the sample lacks from being made up.
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y)
    bias = (mean[d_in:] - mean[:d_in] @ weight).float()
    matrix = weight.float()
    return Candidate(
        name="linear",
        title="linear map",
        reconstruct=lambda rows: Reconstruction(rows[:, :d_in] @ matrix + bias),
        constant_l0=float(d_in),
    )


def _twin_config(sae: SAE) -> SAEConfig:
    """The config of a new SAE with the shape and the activation rule of `sae`; released rules that have no class of ours
    choose by threshold."""
    if not isinstance(sae, Dictionary):
        return sae.cfg.model_copy(update={"apply_b_dec_to_input": True})
    if isinstance(sae.cfg.activation, TopK | GroupMax):
        return TopKConfig(d_in=sae.d_in, d_sae=sae.d_sae, k=sae.cfg.activation.k)
    return JumpReLUConfig(d_in=sae.d_in, d_sae=sae.d_sae)


@torch.no_grad()
def random_candidate(sae: SAE, x: Tensor, *, l0: float, seed: int) -> Candidate:
    """Returns an untrained dictionary of the SAE's shape and activation rule.

    Unit decoder rows in random directions and the encoder tied to them, around the mean of `x`. Where features have thresholds or
    a bias in their place, all get the same, at which `l0` of them fire on `x`. One gain, fitted on `x` by least squares, keeps
    the row from losing by its scale alone: random directions overlap, so that unscaled they overshoot.

    Args:
        x: training tokens `[n, d_in]`.
        l0: mean number of active features that thresholds are set to.
    """
    random = build_sae(_twin_config(sae), seed=seed).to(x.device).eval()
    random.b_dec.copy_(x.mean(dim=0, dtype=torch.float64))
    sample = x[: max(64, _CALIBRATION_ENTRIES // sae.d_sae)]
    if isinstance(random, JumpReLUSAE | BatchTopKSAE | ReLUSAE | GatedSAE):
        pre_acts = random.pre_acts(sample).flatten()
        num_active = round(l0 * len(sample))
        threshold = pre_acts.kthvalue(max(1, pre_acts.numel() - num_active)).values
        if isinstance(random, JumpReLUSAE | BatchTopKSAE):
            random.threshold.fill_(threshold.clamp_min(0.0).item())
        else:
            random.b_enc.fill_(-threshold.clamp_min(0.0).item())
    centred = (sample - random.b_dec).double()
    made = (random(sample).x_hat - random.b_dec).double()
    energy = made.square().sum()
    if energy > 0:
        random.W_dec.mul_((made * centred).sum() / energy)
    return sae_candidate(random, name="random", title="random dictionary")
