"""Multi-layer SAE: one dictionary for the activations of every layer, each a sample of its own."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from saekit.errors import ConfigError
from saekit.sae.base import SAEOutput
from saekit.sae.fold import Normalization
from saekit.sae.sites import SitesConfig, SitesSAE
from saekit.sae.topk import KConfig, TopKConfig, TopKSAE

__all__ = ["MLSAE", "MLSAEConfig"]


class MLSAEConfig(SitesConfig, KConfig):
    """A multi-layer SAE of which every activation keeps its k largest features."""

    kind: Literal["mlsae"] = "mlsae"
    """Architecture."""
    is_normalized_per_site: bool = True
    """Whether each hook point has a mean and a scale of its own, so that late layers do not outweigh early ones; False = one
    mean and scale for the activations of all."""


class MLSAE(SitesSAE, TopKSAE):
    """`a[s] = topk(u[s] @ W_enc + b_enc)` with u[s] = (x[s] - site_mean[s]) * site_scale[s], less b_dec where the config says so;
    `x_hat[s] = site_mean[s] + (a[s] @ W_dec + b_dec) / site_scale[s]`.

    Feature activations are [..., S, d_sae]. `at` gives the TopK SAE that this is at one hook point.

    Attributes:
        W_enc, b_enc, W_dec, b_dec: as of an SAE of normalised activations, the same for every site.
        site_mean: [S, d_in], subtracted from each site's activations; 0 before training has measured it.

    Source: Lawson et al. 2024, arXiv 2409.04185, section 3 (there each activation is normalised by its own mean and norm).
    """

    cfg: MLSAEConfig
    site_mean: nn.Parameter

    def __init__(
        self,
        cfg: MLSAEConfig,
        *,
        seed: int = 0,
        hook_point: str | None = None,
        source: Mapping[str, object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes an SAE with tied random directions for activations that are normalised already.

        Raises:
            ConfigError: the config does not say d_in or num_sites.
        """
        super().__init__(cfg, seed=seed, hook_point=hook_point, source=source, dtype=dtype)
        self.site_mean = nn.Parameter(torch.zeros(cfg.num_sites, cfg.d_in, dtype=dtype), requires_grad=False)

    def at(self, site: int | str) -> TopKSAE:
        """Returns the SAE of raw activations at one hook point, with weights of its own and activations in the model's units.

        Args:
            site: its place, or its name.

        Raises:
            ConfigError: no such hook point.
        """
        names = self.hook_points
        if isinstance(site, str):
            if site not in names:
                raise ConfigError(
                    f"sae: found hook point {site!r}, needs one of {', '.join(names) or 'none, by number'}"
                )
            site = names.index(site)
        if not 0 <= site < self.num_sites:
            raise ConfigError(f"sae: found hook point number {site}, needs 0 to {self.num_sites - 1}")
        cfg = TopKConfig(
            d_in=self.d_in, d_sae=self.d_sae, k=self.cfg.k, apply_b_dec_to_input=self.cfg.apply_b_dec_to_input
        )
        sae = TopKSAE(cfg, hook_point=names[site] if names else None, source=self.source, dtype=self.W_enc.dtype)
        sae.to(self.W_enc.device).train(self.training)
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(self.get_parameter(name))
        scale = float(self.site_scale[site])
        # The variance is of no use to the fold.
        Normalization(mean=self.site_mean[site].detach().double(), scale=scale, total_variance=1.0).fold(sae)
        return sae

    def written_rows(self, features: Tensor) -> Tensor:
        """Returns what one unit of each of `features` [n] adds at the last site, [n, d_in]."""
        return self.W_dec[features] / self.site_scale[-1].to(self.W_dec.dtype)

    def encoder_input(self, x: Tensor) -> Tensor:
        """Returns what the encoder multiplies, a row a token and site: [N * S, d_in].

        Raises:
            ConfigError: `x` has other last axes.
        """
        rows = (self.site_rows(x) - self.site_mean) * self._scales()
        return super().encoder_input(rows.flatten(0, 1))

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (top_acts [N, S, k], top_indices [N, S, k]) of x [N, S, d_in], the largest first."""
        top_acts, top_indices = super().encode_sparse(x)
        shape = (len(top_acts) // self.num_sites, self.num_sites, self.cfg.k)
        return top_acts.reshape(shape), top_indices.reshape(shape)

    def encode(self, x: Tensor) -> Tensor:
        """Returns dense feature activations [..., S, d_sae] of x [..., S, d_in]."""
        top_acts, top_indices = self.encode_sparse(x)
        dense = top_acts.new_zeros(*top_acts.shape[:2], self.d_sae).scatter_add(2, top_indices, top_acts)
        return dense.reshape(*self.outer_shape(x), self.num_sites, self.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Returns x_hat [..., S, d_in] of dense feature activations [..., S, d_sae]."""
        return self._raw(super().decode(feature_acts))

    def decode_sparse(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Returns x_hat [N, S, d_in] of top_acts [N, S, K] at top_indices [N, S, K]."""
        made = super().decode_sparse(top_acts.flatten(0, 1), top_indices.flatten(0, 1))
        return self._raw(made.reshape(len(top_acts), self.num_sites, self.d_in))

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [N, S, d_in] or [N, S * d_in]; x_hat has the shape of x, codes are those of `encode_sparse`."""
        x_hat, top_acts, top_indices = super().forward(x)
        return SAEOutput(x_hat.reshape(x.shape), top_acts, top_indices)

    @torch.no_grad()
    def fold_sites(self, mean: Tensor, scale: Tensor) -> None:
        """Turns an SAE of normalised sites into the same one of raw sites; all other weights stay as they are."""
        self.site_mean.copy_(mean)
        self.site_scale.copy_(scale)

    @torch.no_grad()
    def unfold_sites(self, mean: Tensor, scale: Tensor) -> None:
        """Turns an SAE of raw sites into one of sites normalised so; the same one if its own mean and scale are given."""
        self.site_mean.zero_()
        self.site_scale.fill_(1.0)

    def _scales(self) -> Tensor:
        return self.site_scale.to(self.W_enc.dtype)[:, None]

    def _raw(self, normalized: Tensor) -> Tensor:
        return self.site_mean + normalized / self._scales()
