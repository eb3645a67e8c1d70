"""Crosscoders: one set of features reads several hook points together and reconstructs each with a decoder of its own."""

from typing import Literal

import torch
from torch import Tensor

from saekit.sae.base import SAEOutput
from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.relu import L1Config, ReLUSAE
from saekit.sae.sites import SitesConfig, SitesSAE
from saekit.sae.topk import KConfig, TopKSAE

__all__ = [
    "BatchTopKCrosscoder",
    "BatchTopKCrosscoderConfig",
    "Crosscoder",
    "CrosscoderConfig",
    "ReLUCrosscoder",
    "ReLUCrosscoderConfig",
    "TopKCrosscoder",
    "TopKCrosscoderConfig",
]


class CrosscoderConfig(SitesConfig):
    """What all crosscoders share."""

    apply_b_dec_to_input: Literal[False] = False
    """Always false: the encoder adds up the sites as they are."""


class ReLUCrosscoderConfig(CrosscoderConfig, L1Config):
    """A crosscoder whose features are kept few by an L1 penalty on activations times the sum of their decoder norms."""

    kind: Literal["crosscoder_relu"] = "crosscoder_relu"
    """Architecture."""
    is_norm_weighted: Literal[True] = True
    """Always true: decoder rows have no other size to be held at."""


class TopKCrosscoderConfig(CrosscoderConfig, KConfig):
    """A crosscoder of which every token keeps its k largest features."""

    kind: Literal["crosscoder_topk"] = "crosscoder_topk"
    """Architecture."""


class BatchTopKCrosscoderConfig(CrosscoderConfig, KConfig):
    """A crosscoder of which a batch keeps its N * k largest features."""

    kind: Literal["crosscoder_batchtopk"] = "crosscoder_batchtopk"
    """Architecture."""


class Crosscoder(SitesSAE):
    """`a = act(sum over sites of x[s] @ W_enc[s] + b_enc)`, `x_hat[s] = a @ W_dec[s] + b_dec[s]`.

    The size of a feature's decoder is the sum over sites of the norms of its rows, in normalised sites. It is held at 1 (ReLU:
    it is free in training and made 1 at the end), so that comparing activations is comparing them times that sum.

    Attributes:
        W_enc: [S * d_in, d_sae], the sites' encoders one below the other.
        W_dec: [d_sae, S * d_in], the sites' decoders side by side; sum over s of `site_scale[s]` times their norms is 1.
        b_dec: [S * d_in].

    Source: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing" (the model, the L1 penalty);
    Minder et al. 2025, arXiv 2504.02922, section 2 (top-k of activations times the sum of decoder norms).
    """

    cfg: CrosscoderConfig
    has_unit_rows = False

    @property
    def widths(self) -> tuple[int, int]:
        """Width of all sites together, twice."""
        width = self.num_sites * self.d_in
        return width, width

    def decoder_norms(self) -> Tensor:
        """Returns each feature's sum over sites of the norm of its decoder row, [d_sae]."""
        return self._site_norms().sum(1)

    @torch.no_grad()
    def site_shares(self) -> Tensor:
        """Returns the part of each feature's decoder norm at each site, in normalised sites, [d_sae, S]; rows add up to 1."""
        norms = self._site_norms() * self.site_scale
        return norms / norms.sum(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def normalized_decoder(self) -> Tensor:
        """Returns W_dec in units of normalised sites, in which they can be compared, [d_sae, S * d_in]."""
        return self.W_dec * self.site_scale.to(self.W_dec.dtype).repeat_interleave(self.d_in)

    def written_rows(self, features: Tensor) -> Tensor:
        """Returns what one unit of each of `features` [n] adds at the last site, [n, d_in]."""
        return self.W_dec[features, -self.d_in :]

    def encoder_input(self, x: Tensor) -> Tensor:
        """Returns x as [N, S * d_in] in the dictionary's dtype.

        Raises:
            ConfigError: `x` has other last axes.
        """
        return self.site_rows(x).flatten(1)

    def encode(self, x: Tensor) -> Tensor:
        """Returns dense feature activations [..., d_sae] of x [..., S, d_in]."""
        return super().encode(self.encoder_input(x)).reshape(*self.outer_shape(x), self.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Returns x_hat [..., S, d_in] of dense feature activations [..., d_sae]."""
        return super().decode(feature_acts).reshape(*feature_acts.shape[:-1], self.num_sites, self.d_in)

    def decode_sparse(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Returns x_hat [N, S, d_in] of top_acts [N, K] at top_indices [N, K]."""
        return super().decode_sparse(top_acts, top_indices).reshape(-1, self.num_sites, self.d_in)

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [N, S, d_in] or [N, S * d_in]; x_hat has the shape of x."""
        x_hat, top_acts, top_indices = super().forward(self.encoder_input(x))
        return SAEOutput(x_hat.reshape(x.shape), top_acts, top_indices)

    @torch.no_grad()
    def fold_sites(self, mean: Tensor, scale: Tensor) -> None:
        """Turns a crosscoder of normalised sites into the same one of raw sites; activations stay as they are."""
        mean, scale = mean.to(self.b_dec.device), scale.to(self.b_dec.device)
        scales = scale.repeat_interleave(self.d_in)
        self.W_enc.mul_(scales[:, None].to(self.W_enc))
        self.shift_inputs(-self._read(mean))
        self.W_dec.div_(scales.to(self.W_dec))
        self.b_dec.copy_(self.b_dec.double() / scales + mean.flatten())
        self.site_scale.copy_(scale)

    @torch.no_grad()
    def unfold_sites(self, mean: Tensor, scale: Tensor) -> None:
        """The inverse of `fold_sites`."""
        mean, scale = mean.to(self.b_dec.device), scale.to(self.b_dec.device)
        scales = scale.repeat_interleave(self.d_in)
        self.b_dec.copy_((self.b_dec.double() - mean.flatten()) * scales)
        self.W_dec.mul_(scales.to(self.W_dec))
        self.shift_inputs(self._read(mean))
        self.W_enc.div_(scales[:, None].to(self.W_enc))
        self.site_scale.fill_(1.0)

    def _read(self, mean: Tensor) -> Tensor:
        """Returns `mean` [S, d_in] through the encoders, in float64 a site at a time, [d_sae]."""
        weights = torch.split(self.W_enc, self.d_in)
        return torch.stack([row @ W_enc.double() for row, W_enc in zip(mean, weights, strict=True)]).sum(0)

    def _site_norms(self) -> Tensor:
        norms: Tensor = self.W_dec.view(self.d_sae, self.num_sites, self.d_in).norm(dim=2)
        return norms  # [F, S]


class ReLUCrosscoder(Crosscoder, ReLUSAE):
    """A crosscoder of all positive pre-activations."""

    cfg: ReLUCrosscoderConfig


class TopKCrosscoder(Crosscoder, TopKSAE):
    """A crosscoder of each token's k largest pre-activations."""

    cfg: TopKCrosscoderConfig


class BatchTopKCrosscoder(Crosscoder, BatchTopKSAE):
    """A crosscoder of a batch's N * k largest pre-activations, with one threshold afterwards."""

    cfg: BatchTopKCrosscoderConfig
