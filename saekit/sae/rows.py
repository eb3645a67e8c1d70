"""What SAEs share whose tokens use as many features as are active, found without a dense [N, d_sae] code."""

from abc import abstractmethod
from typing import NamedTuple

from saekit_kernels import decode
from torch import Tensor

from saekit.sae.base import SAE, SAEOutput
from saekit.sae.sparse import pad_rows

__all__ = ["ActiveRows", "RowSAE"]


class ActiveRows(NamedTuple):
    """Active features as rows of varying length."""

    acts: Tensor
    """[nnz], > 0 or NaN."""
    indices: Tensor
    """[nnz] int64."""
    offsets: Tensor
    """[N + 1] int64, where each token's entries begin."""

    def padded(self) -> tuple[Tensor, Tensor]:
        """Returns (top_acts [N, K], top_indices [N, K]), the largest first; places not used hold 0 and 0."""
        return pad_rows(self.acts, self.indices, self.offsets)


class RowSAE(SAE):
    """An SAE whose tokens use different numbers of features."""

    @abstractmethod
    def active_rows(self, x: Tensor) -> ActiveRows:
        """Returns the active features of x [N, d_in]."""

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (top_acts [N, K], top_indices [N, K]), K the most features any of the tokens has; the largest first."""
        return self.active_rows(x).padded()

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and reconstructs x [N, d_in]; padding is not decoded."""
        rows = self.active_rows(x)
        x_hat = decode(rows.acts, rows.indices, self.W_dec, self.b_dec, offsets=rows.offsets)
        return SAEOutput(x_hat.to(self.W_dec.dtype), *rows.padded())
