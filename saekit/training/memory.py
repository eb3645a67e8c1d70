"""What a training holds in memory, before it is begun."""

import os

import torch

from saekit.sae.base import SAE
from saekit.sae.batch import num_samples
from saekit.training.config import TrainConfig

__all__ = ["free_bytes", "training_bytes"]

FLOAT_BYTES = 4
OPTIMIZER_BYTES = {"adam": 8, "adamw8bit": 2, "muon": 4, "signum": 8}
"""State of an optimizer for each trained number; block scales and Muon's vectors are left out as small."""
TOKEN_ARRAYS = 8
"""Arrays as wide as an activation that a step holds at a time: raw, normalised, encoder's input, error and their gradients."""


def training_bytes(sae: SAE, config: TrainConfig, *, num_processes: int = 1) -> int:
    """Returns about how many bytes a process needs to train the SAE, apart from the data that it reads.

    Weights, gradients, optimizer state, averages; and what is computed for the tokens taken at a time.
    """
    numbers = sum(parameter.numel() for parameter in sae.parameters())
    each = 2 * FLOAT_BYTES + OPTIMIZER_BYTES[config.optimizer] + (FLOAT_BYTES if config.ema_decay is not None else 0)
    share = config.batch_size // num_processes
    tokens = min(share, config.micro_batch_size or share)
    return numbers * each + tokens * TOKEN_ARRAYS * num_samples(sae) * max(sae.widths) * FLOAT_BYTES


def free_bytes(device: torch.device) -> int:
    """Returns the memory that is free where the training runs."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
