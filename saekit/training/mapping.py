"""The objective of transcoders: another place's activations are predicted from those that are read."""

from torch import Tensor, nn

from saekit.sae.losses import reconstruction_loss
from saekit.sae.transcoder import Transcoder
from saekit.training.objective import Code, TopKObjective

__all__ = ["TranscoderObjective"]


class TranscoderObjective(TopKObjective):
    """Prediction of the target half of [N, d_in + d_out] pairs, and AuxK on what the prediction leaves over."""

    sae: Transcoder

    def reconstruct(self, inputs: Tensor, target: Tensor, code: Code) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the prediction term with its graph, the same as FVU, and target less prediction [N, d_out]."""
        predicted = self.decode(code.values, code, self.sae.W_dec, self.sae.b_dec) + self.sae.skip(inputs)
        error = target - predicted
        fvu = reconstruction_loss(error, self.total_variance)
        return fvu, fvu, error

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Returns what the optimizer moves, by name."""
        skip = {} if self.sae.W_skip is None else {"W_skip": self.sae.W_skip}
        return super().trained_parameters() | skip
