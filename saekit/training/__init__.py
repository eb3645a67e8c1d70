"""Training of sparse autoencoders from activations."""

from saekit.training.config import EndToEndConfig, ResampleConfig, SparsityConfig, TrainConfig
from saekit.training.metrics import read_metrics
from saekit.training.together import train_together
from saekit.training.trainer import Trainer

__all__ = [
    "EndToEndConfig",
    "ResampleConfig",
    "SparsityConfig",
    "TrainConfig",
    "Trainer",
    "read_metrics",
    "train_together",
]
