"""Training options that mean nothing to an architecture: refused before anything is read, never ignored."""

from saekit.errors import ConfigError
from saekit.sae.base import SAEConfig
from saekit.sae.jumprelu import JumpReLUConfig
from saekit.sae.penalized import PenalizedConfig
from saekit.sae.sites import SitesConfig
from saekit.sae.transcoder import TranscoderConfig
from saekit.training.config import MeshConfig, TrainConfig

__all__ = ["check_options", "latents_problem"]


def check_options(cfg: SAEConfig, config: TrainConfig, *, where: str = "training") -> None:
    """Checks that every option that was set does something for this kind of SAE.

    Raises:
        ConfigError: one line that names the option, the kind and what is needed; it begins with `where`.
    """
    kind = getattr(cfg, "kind", type(cfg).__name__)
    if config.objective is not None:
        objective = f"{where}: objective {config.objective.kind!r}"
        if isinstance(cfg, TranscoderConfig):
            raise ConfigError(f"{objective}: found a transcoder, needs an SAE that reconstructs what it reads")
        if isinstance(cfg, SitesConfig):
            raise ConfigError(f"{objective}: found {kind!r}, needs an SAE of one hook point")
    _check_layout(cfg, config, where)
    sparsity = config.sparsity
    if sparsity.dead_loss != "auxk" and not isinstance(cfg, JumpReLUConfig):
        raise ConfigError(
            f"{where}: sparsity.dead_loss {sparsity.dead_loss!r} with {kind!r}, needs 'auxk' for all but 'jumprelu'"
        )
    if sparsity.k_start_factor != 1.0 and isinstance(cfg, PenalizedConfig):
        raise ConfigError(
            f"{where}: sparsity.k_start_factor {sparsity.k_start_factor:g} with {kind!r}, needs an SAE with a k;"
            " start_factor is what a target_l0 starts from"
        )


def latents_problem(cfg: SAEConfig, config: TrainConfig) -> str | None:
    """Returns why the features of an SAE cannot be spread over processes in a training; None where they can."""
    if isinstance(cfg, SitesConfig):
        return f"{cfg.kind!r}, whose features have a part at each hook point"
    if config.objective is not None:
        return f"objective {config.objective.kind!r}, which needs whole reconstructions in the model"
    if config.resample is not None:
        return "resample, which draws from all features"
    if config.optimizer == "muon":
        return "optimizer 'muon', which orthogonalises whole matrices"
    if config.optimizer == "adamw8bit":
        return "optimizer 'adamw8bit', whose blocks of moments would be cut"
    return None


def _check_layout(cfg: SAEConfig, config: TrainConfig, where: str) -> None:
    """Refuses what cannot be done where features are spread over processes."""
    layout = config.layout
    if layout == "latents" or (isinstance(layout, MeshConfig) and layout.latents > 1):
        problem = latents_problem(cfg, config)
        if problem is not None:
            raise ConfigError(f"{where}: layout with features over processes and {problem}, needs 'data' or 'layers'")
