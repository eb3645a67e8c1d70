"""The Triton path as one module of primitives; imported only when it runs."""

from saekit_kernels._decode_triton import feature_sum, gather_dot, gather_sum, scatter_sum
from saekit_kernels._encode_triton import threshold, topk

__all__ = ["feature_sum", "gather_dot", "gather_sum", "scatter_sum", "threshold", "topk"]
