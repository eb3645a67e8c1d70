"""What a training holds in memory, before it is begun."""

import os

import torch

from saekit.sae.base import SAE
from saekit.sae.batch import num_samples
from saekit.training.config import TrainConfig

__all__ = ["FLOAT_BYTES", "OPTIMIZER_BYTES", "free_bytes", "memory_parts", "tokens_at_a_time", "training_bytes"]

FLOAT_BYTES = 4
OPTIMIZER_BYTES = {"adam": 8, "adamw8bit": 2, "muon": 4, "signum": 8}
"""State of an optimizer for each trained number; block scales and Muon's vectors are left out as small."""
TOKEN_ARRAYS = 8
"""Arrays as wide as an activation that a step holds at a time: raw, normalised, encoder's input, error and their gradients."""


def tokens_at_a_time(config: TrainConfig, num_processes: int) -> int:
    """Returns the tokens that a process computes with at a time."""
    share = config.batch_size // num_processes
    return min(share, config.micro_batch_size or share)


def memory_parts(
    num_trained: int, num_held: int, row_width: int, config: TrainConfig, *, tokens: int
) -> dict[str, int]:
    """Returns the bytes that a process needs by what they are for, apart from the data that it reads.

    Args:
        num_trained: numbers that have a gradient.
        num_held: numbers that have none.
        row_width: numbers of the widest row of a token, over all of its samples.
        config: optimizer and average.
        tokens: computed with at a time.
    """
    return {
        "weights": FLOAT_BYTES * (num_trained + num_held),
        "optimizer": OPTIMIZER_BYTES[config.optimizer] * num_trained,
        "average": FLOAT_BYTES * num_trained if config.ema_decay is not None else 0,
        "gradients": FLOAT_BYTES * num_trained,
        "activations": tokens * TOKEN_ARRAYS * row_width * FLOAT_BYTES,
    }


def training_bytes(sae: SAE, config: TrainConfig, *, num_processes: int = 1, parts: int = 1) -> int:
    """Returns about how many bytes a process needs to train the SAE, apart from the data that it reads.

    Weights, gradients, optimizer state, averages; and what is computed for the tokens taken at a time.

    Args:
        sae: the whole one.
        config: its training.
        num_processes: that share a batch.
        parts: processes that share the features.
    """
    numbers = sum(parameter.numel() for parameter in sae.parameters()) // parts
    row_width = num_samples(sae) * max(sae.widths)
    tokens = tokens_at_a_time(config, num_processes)
    return sum(memory_parts(numbers, 0, row_width, config, tokens=tokens).values())


def free_bytes(device: torch.device) -> int:
    """Returns the memory that is free where the training runs."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
