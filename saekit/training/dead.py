"""Which features have been silent too long, counted in tokens over all processes."""

import torch
from torch import Tensor

from saekit.training.config import TrainConfig

__all__ = ["DeadFeatures", "default_dead_after"]

MAX_DEAD_AFTER_TOKENS = 10_000_000


def default_dead_after(config: TrainConfig) -> int:
    """Returns dead_after_tokens, or a thirtieth of the training up to 10 million tokens.

    In a training of a million tokens a tenth finds dead features too late: twice as many stay dead as with a thirtieth.

    Source: Gao et al. 2024, appendix A.2 (10 million).
    """
    return config.dead_after_tokens or min(MAX_DEAD_AFTER_TOKENS, max(config.batch_size, config.num_tokens // 30))


class DeadFeatures:
    """Tokens since each feature was last active."""

    def __init__(self, d_sae: int, dead_after_tokens: int, device: torch.device) -> None:
        self.dead_after_tokens = dead_after_tokens
        self.silent_tokens = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, fired: Tensor, num_tokens: int) -> None:
        """Notes a step: `fired` [d_sae] bool over all processes, `num_tokens` over all processes."""
        self.silent_tokens += num_tokens
        self.silent_tokens[fired] = 0

    def renew(self, features: Tensor) -> None:
        """Counts some features [n] from now on, as if they had just been active."""
        self.silent_tokens[features] = 0

    @property
    def mask(self) -> Tensor:
        """Which features are dead [d_sae] bool."""
        return self.silent_tokens >= self.dead_after_tokens
