"""What SAEs with thresholds share: a feature is active where its pre-activation exceeds the threshold."""

import torch
from saekit_kernels import encode_threshold
from torch import Tensor, nn

from saekit.sae.rows import ActiveRows, RowSAE

__all__ = ["ThresholdSAE"]


class ThresholdSAE(RowSAE):
    """`z * (z > threshold)`, thresholds below 0 counting as 0.

    Attributes:
        threshold: [d_sae], or [1] for all features; at least float32, in units of raw activations.
    """

    threshold: nn.Parameter

    @torch.no_grad()
    def scale_thresholds(self, factor: float) -> None:
        """Multiplies every threshold by `factor`."""
        self.threshold.mul_(factor)

    def active_rows(self, x: Tensor) -> ActiveRows:
        """Returns the features above their thresholds of x [N, d_in]."""
        threshold = self.threshold.detach().clamp_min(0).expand(self.d_sae)
        return ActiveRows(*encode_threshold(self.encoder_input(x), self.W_enc, self.b_enc, threshold))
