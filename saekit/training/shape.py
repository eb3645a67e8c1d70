"""How large an SAE is and how many numbers train it, in closed form: nothing is allocated."""

from dataclasses import dataclass

from saekit.errors import ConfigError
from saekit.sae.base import SAEConfig
from saekit.sae.matryoshka import MatryoshkaConfig
from saekit.sae.mlsae import MLSAEConfig
from saekit.sae.penalized import PenalizedConfig
from saekit.sae.sites import SitesConfig
from saekit.sae.topk import KConfig
from saekit.sae.transcoder import TranscoderConfig

__all__ = ["SAEShape", "shape_of"]

MORE_PER_FEATURE = {"jumprelu": 1, "gated": 2}
"""Logarithms of the thresholds; gains and biases of the magnitudes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEShape:
    """Sizes of an SAE of known widths."""

    kind: str
    """Architecture."""
    d_sae: int
    """F, features."""
    width_in: int
    """Of what W_enc multiplies."""
    width_out: int
    """Of what W_dec makes."""
    batch_width: int
    """Of a token's row in a batch."""
    samples: int
    """Codes a token has: one for each hook point of a multi-layer SAE."""
    is_penalized: bool
    """Whether a steered penalty makes it sparse, rather than a k."""
    active: float
    """Features that a sample uses at the end of training: k, or the target L0."""
    groups: int
    """Prefixes that reconstruct by themselves; 1 but for Matryoshka SAEs."""
    num_trained: int
    """Numbers that the optimizer moves."""
    num_held: int
    """Numbers of the SAE that no gradient belongs to: thresholds that follow others, means and scales of hook points."""

    subtracts_b_dec: bool
    """Whether the encoder reads what is left without b_dec."""

    def share(self, processes: int) -> int:
        """Returns the trained numbers of the largest of some processes that share the features; biases of the output are on all."""
        each = self.width_in + self.width_out + 1 + MORE_PER_FEATURE.get(self.kind, 0)
        return self.num_trained - (self.d_sae - -(-self.d_sae // processes)) * each

    @property
    def num_matrix(self) -> int:
        """Entries of W_enc and W_dec."""
        return self.d_sae * (self.width_in + self.width_out)


def shape_of(cfg: SAEConfig) -> SAEShape:
    """Returns the sizes of the SAE that a config with known widths stands for.

    Raises:
        ConfigError: a width, the number of hook points or the target L0 is not known.
    """
    d_in, d_sae = cfg.d_in, cfg.d_sae
    d_out = cfg.d_out if isinstance(cfg, TranscoderConfig) else d_in
    sites = cfg.num_sites if isinstance(cfg, SitesConfig) else 1
    if min(d_in, d_out, sites) < 1:
        raise ConfigError(f"sae: {cfg.kind!r} with d_in {d_in}, d_out {d_out}, num_sites {sites}, needs all of them")
    is_crosscoder = isinstance(cfg, SitesConfig) and not isinstance(cfg, MLSAEConfig)
    width_in, width_out = (sites * d_in, sites * d_in) if is_crosscoder else (d_in, d_out)
    return SAEShape(
        kind=cfg.kind,
        d_sae=d_sae,
        width_in=width_in,
        width_out=width_out,
        batch_width=d_in + d_out if isinstance(cfg, TranscoderConfig) else sites * d_in,
        samples=sites if isinstance(cfg, MLSAEConfig) else 1,
        is_penalized=isinstance(cfg, PenalizedConfig),
        active=_active(cfg),
        groups=len(cfg.prefixes()) if isinstance(cfg, MatryoshkaConfig) else 1,
        num_trained=d_sae * (width_in + width_out + 1) + width_out + _more_trained(cfg, d_in, d_out),
        num_held=_held(cfg, d_in, sites),
        subtracts_b_dec=cfg.apply_b_dec_to_input,
    )


def _active(cfg: SAEConfig) -> float:
    if isinstance(cfg, KConfig):
        return float(cfg.k)
    if isinstance(cfg, PenalizedConfig) and cfg.target_l0 is not None:
        return cfg.target_l0
    raise ConfigError(f"sae: no target_l0, needs one to train a {cfg.kind!r} SAE")


def _more_trained(cfg: SAEConfig, d_in: int, d_out: int) -> int:
    if isinstance(cfg, TranscoderConfig):
        return d_in * d_out if cfg.has_skip else 0
    return MORE_PER_FEATURE.get(cfg.kind, 0) * cfg.d_sae


def _held(cfg: SAEConfig, d_in: int, sites: int) -> int:
    thresholds = cfg.d_sae if cfg.kind == "jumprelu" else int(cfg.kind.endswith("batchtopk"))
    scales = sites if isinstance(cfg, SitesConfig) else 0
    means = sites * d_in if isinstance(cfg, MLSAEConfig) else 0
    return thresholds + scales + means
