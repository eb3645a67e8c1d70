"""Training of sparse autoencoders from activations."""

from saekit.training.config import EndToEndConfig, ResampleConfig, SparsityConfig, TrainConfig
from saekit.training.low_bit import check_low_bit
from saekit.training.metrics import read_metrics
from saekit.training.options import check_options
from saekit.training.ringed import check_ring
from saekit.training.together import train_together
from saekit.training.trackers import check_trackers
from saekit.training.trainer import Trainer

__all__ = [
    "EndToEndConfig",
    "ResampleConfig",
    "SparsityConfig",
    "TrainConfig",
    "Trainer",
    "check_low_bit",
    "check_options",
    "check_ring",
    "check_trackers",
    "read_metrics",
    "train_together",
]
