"""What dictionaries share that read whole sequences: the code of a token depends on the tokens before it."""

from abc import abstractmethod

from torch import Tensor

from saekit.errors import ConfigError
from saekit.sae.base import SAE
from saekit.sae.sparse import dense_to_rows

__all__ = ["SequenceSAE"]


class SequenceSAE(SAE):
    """Takes whole sequences: x is [B, T, d_in] or [T, d_in], T in order and from the start of the text."""

    @abstractmethod
    def feature_acts(self, x: Tensor) -> Tensor:
        """Returns dense feature activations [B * T, d_sae] of x."""

    def sequences(self, x: Tensor) -> Tensor:
        """Returns x as [B, T, d_in] in the dictionary's dtype.

        Raises:
            ConfigError: `x` is not a sequence of activations of width d_in.
        """
        if x.ndim not in {2, 3} or x.shape[-1] != self.d_in:
            raise ConfigError(
                f"{self.cfg.kind} dictionary: x has shape {list(x.shape)}, needs [B, T, {self.d_in}] or [T, {self.d_in}]"
            )
        return (x if x.ndim == 3 else x[None]).to(self.W_enc.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Returns feature activations [..., T, d_sae] of x [..., T, d_in]."""
        return self.feature_acts(x).reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns feature activations as (top_acts [B * T, K], top_indices [B * T, K]), the largest magnitude first."""
        return dense_to_rows(self.feature_acts(x))
