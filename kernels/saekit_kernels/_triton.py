"""The Triton path as one module of primitives; imported only when it runs."""

from saekit_kernels._decode_triton import feature_sum, gather_dot, gather_sum, scatter_sum
from saekit_kernels._encode_triton import threshold, topk
from saekit_kernels._optim_triton import adam, gradient_square

__all__ = ["adam", "feature_sum", "gather_dot", "gather_sum", "gradient_square", "scatter_sum", "threshold", "topk"]
