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
    """Tokens since each feature was last active.

    Attributes:
        silent_tokens: [d_sae] int64.
        num_dead: how many of these features are dead, known without asking the device.
    """

    def __init__(self, d_sae: int, dead_after_tokens: int, device: torch.device) -> None:
        self.dead_after_tokens = dead_after_tokens
        self.silent_tokens = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.num_dead = 0

    def after(self, fired: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns what a step makes of `silent_tokens` and, a scalar on the device, of `num_dead`.

        Args:
            fired: which features were active [d_sae] bool, over all processes.
            num_tokens: tokens of the step, over all processes.
        """
        silent_tokens = torch.where(fired, 0, self.silent_tokens + num_tokens)
        return silent_tokens, (silent_tokens >= self.dead_after_tokens).sum()

    def take(self, silent_tokens: Tensor, num_dead: int | None = None) -> None:
        """Notes what `after` returned; without a number of dead features they are counted."""
        self.silent_tokens.copy_(silent_tokens)
        self.num_dead = int(self.mask.sum()) if num_dead is None else num_dead

    def renew(self, features: Tensor) -> None:
        """Counts some features [n] from now on, as if they had just been active."""
        self.silent_tokens[features] = 0
        self.num_dead = int(self.mask.sum())

    @property
    def mask(self) -> Tensor:
        """Which features are dead [d_sae] bool."""
        return self.silent_tokens >= self.dead_after_tokens

    @property
    def indices(self) -> Tensor:
        """The dead features, rising [num_dead] int64."""
        if self.num_dead == 0:
            return self.silent_tokens[:0]
        # Where they are not looked for by nonzero, nothing has to be waited for.
        return self.mask.logical_not().to(torch.int8).argsort(stable=True)[: self.num_dead]
