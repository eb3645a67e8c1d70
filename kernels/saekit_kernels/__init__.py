"""Sparse encode, decode and optimizer kernels for sparse autoencoders; needs torch alone, and is usable without saekit."""

from saekit_kernels.auxk import auxk
from saekit_kernels.backend import Backend, BackendError, ResolvedBackend, resolve_backend
from saekit_kernels.decode import decode
from saekit_kernels.encode import encode_batch_topk, encode_threshold, encode_topk
from saekit_kernels.optim import adam_step, gradient_square
from saekit_kernels.primitives import AdamStep
from saekit_kernels.sparse_code import BatchTopKCode, ReverseIndex, ThresholdCode, TopKCode, reverse_index

__all__ = [
    "AdamStep",
    "Backend",
    "BackendError",
    "BatchTopKCode",
    "ResolvedBackend",
    "ReverseIndex",
    "ThresholdCode",
    "TopKCode",
    "adam_step",
    "auxk",
    "decode",
    "encode_batch_topk",
    "encode_threshold",
    "encode_topk",
    "gradient_square",
    "resolve_backend",
    "reverse_index",
]
