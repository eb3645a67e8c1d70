"""How well batches are mixed: the documents in a batch against those in a batch of a full shuffle."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from saekit.activations.shuffle import ShuffledBatches

__all__ = ["Mixing", "expected_documents", "measure_mixing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """Mean numbers of distinct documents in a global batch."""

    documents: float
    """As the batches are."""
    ideal: float
    """Expected of tokens drawn uniformly without replacement."""

    @property
    def ratio(self) -> float:
        """1.0 is a full shuffle."""
        return self.documents / self.ideal

    def __str__(self) -> str:
        return f"a batch mixes {self.documents:,.0f} documents, {self.ratio:.0%} of the {self.ideal:,.0f} of a full shuffle"


def measure_mixing(batches: ShuffledBatches, num_batches: int = 16) -> Mixing:
    """Returns the mixing of evenly spaced batches of the first epoch; reads no activations."""
    documents = batches.view.store.documents().ravel()
    total = batches.batches_per_epoch
    chosen = np.unique(np.linspace(0, total - 1, min(num_batches, total)).astype(np.int64)).tolist()
    found = [len(np.unique(documents[batches.batch_indices(0, batch)])) for batch in chosen]
    sizes = np.bincount(documents[batches.view.mask.ravel()])
    return Mixing(documents=float(np.mean(found)), ideal=expected_documents(sizes, batches.global_batch_size))


def expected_documents(sizes: npt.NDArray[np.int64], num_drawn: int) -> float:
    """Returns the expected number of distinct documents among tokens drawn uniformly without replacement.

    A document of c of n tokens is missed by m draws with probability C(n - c, m) / C(n, m), the hypergeometric's zero.

    Args:
        sizes: tokens of each document.
        num_drawn: m, at most the sum of `sizes`.
    """
    total = int(sizes.sum())
    kept = sizes[sizes > 0].astype(np.int64)
    left = total - kept
    can_miss = left >= num_drawn
    left = left[can_miss]
    log_missed = (
        _log_factorial(left)
        - _log_factorial(left - num_drawn)
        - _log_factorial(np.array(total))
        + _log_factorial(np.array(total - num_drawn))
    )
    return float(len(kept) - np.exp(log_missed).sum())


def _log_factorial(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    logs: npt.NDArray[np.float64] = torch.lgamma(torch.as_tensor(numbers, dtype=torch.float64) + 1).numpy()
    return logs
