"""The Triton path as one module of primitives; imported only when it runs."""

from saekit_kernels._candidates_triton import candidates
from saekit_kernels._decode_triton import feature_sum, gather_dot, gather_sum, scatter_sum
from saekit_kernels._encode_choice import topk
from saekit_kernels._optim_triton import adam, gradient_square
from saekit_kernels._threshold_triton import threshold

__all__ = [
    "adam",
    "candidates",
    "feature_sum",
    "gather_dot",
    "gather_sum",
    "gradient_square",
    "scatter_sum",
    "threshold",
    "topk",
]
