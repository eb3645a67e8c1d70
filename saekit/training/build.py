"""Which objective trains which architecture."""

from saekit.errors import ConfigError
from saekit.sae.base import SAE, SAEConfig
from saekit.sae.batchtopk import BatchTopKSAE
from saekit.sae.gated import GatedSAE
from saekit.sae.jumprelu import JumpReLUSAE
from saekit.sae.matryoshka import MatryoshkaBatchTopKSAE, MatryoshkaTopKSAE
from saekit.sae.penalized import PenalizedConfig
from saekit.sae.relu import ReLUSAE
from saekit.sae.topk import TopKSAE
from saekit.sae.transcoder import Transcoder
from saekit.training.config import TrainConfig
from saekit.training.layout import Layout
from saekit.training.mapping import TranscoderObjective
from saekit.training.nested import MatryoshkaBatchTopKObjective, MatryoshkaTopKObjective
from saekit.training.objective import BatchTopKObjective, Objective, TopKObjective
from saekit.training.penalty import GatedObjective, JumpReLUObjective, ReLUObjective

__all__ = ["build_objective", "check_trainable"]

# Special cases before what they derive from.
_OBJECTIVES: tuple[tuple[type[SAE], type[Objective]], ...] = (
    (Transcoder, TranscoderObjective),
    (MatryoshkaTopKSAE, MatryoshkaTopKObjective),
    (MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKObjective),
    (TopKSAE, TopKObjective),
    (BatchTopKSAE, BatchTopKObjective),
    (JumpReLUSAE, JumpReLUObjective),
    (ReLUSAE, ReLUObjective),
    (GatedSAE, GatedObjective),
)


def build_objective(
    sae: SAE,
    config: TrainConfig,
    *,
    total_variance: float,
    layout: Layout | None = None,
    cfg: SAEConfig | None = None,
) -> Objective:
    """Returns the objective of the SAE's architecture.

    Args:
        sae: of normalised activations, or this process's part of one.
        config: its training.
        total_variance: of what is reconstructed.
        layout: who holds other tokens or features; None = nobody.
        cfg: of the whole SAE; None = the one of `sae`.

    Raises:
        ConfigError: see `check_trainable`.
    """
    check_trainable(sae)
    objective = next(objective for cls, objective in _OBJECTIVES if isinstance(sae, cls))
    return objective(sae, config, total_variance=total_variance, layout=layout, cfg=cfg)


def check_trainable(sae: SAE) -> None:
    """Checks that the SAE's architecture and config say all that training needs.

    Raises:
        ConfigError: no objective belongs to it, or its sparsity comes from a penalty and it has no target L0.
    """
    if not any(isinstance(sae, cls) for cls, _ in _OBJECTIVES):
        known = ", ".join(sorted(cls.__name__ for cls, _ in _OBJECTIVES))
        raise ConfigError(f"sae: {type(sae).__name__} cannot be trained, needs one of {known}")
    if isinstance(sae.cfg, PenalizedConfig) and sae.cfg.target_l0 is None:
        name = type(sae).__name__.removesuffix("SAE")
        raise ConfigError(f"sae: no target_l0, needs one to train a {name} SAE")
