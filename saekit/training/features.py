"""Where a feature's own numbers are in the trained parameters, and in whatever has their shape."""

from torch import Tensor

from saekit.sae.base import SAE
from saekit.sae.jumprelu import JumpReLUSAE

__all__ = ["PER_FEATURE", "by_feature", "names_per_feature"]

PER_FEATURE = frozenset({"W_enc", "b_enc", "W_dec", "log_threshold", "r_mag", "b_mag"})
"""Trained parameters that have an entry or a row for each feature."""


def by_feature(name: str, value: Tensor) -> Tensor:
    """Returns the view of a parameter of PER_FEATURE, or of what has its shape, whose first axis are the features.

    Of W_enc's view that is W_enc again.
    """
    return value.T if name == "W_enc" else value


def names_per_feature(sae: SAE) -> frozenset[str]:
    """Returns the names of the SAE's parameters that have an entry or a row for each feature."""
    return PER_FEATURE | {"threshold"} if isinstance(sae, JumpReLUSAE) else PER_FEATURE
