"""What the largest of a few features make of each token, at the cost of those features: AuxK over the dead ones."""

import torch
from torch import Tensor

from saekit_kernels.backend import Backend
from saekit_kernels.decode import decode
from saekit_kernels.encode import check_operands, encode_topk
from saekit_kernels.primitives import compute_dtype, without_autocast


def auxk(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int, *, backend: Backend = "auto") -> Tensor:
    """The sum over the k largest pre-activations of each token of relu(z) times the feature's row of W_dec.

    For weights that were compacted to the dead features, `W_enc[:, dead]` and `W_dec[dead]`: then neither a [N, F] array of all
    features is made, nor one of [N, n] for the n given ones. Selection is that of `encode_topk`, the backward of encoder and
    decoder shares one reverse index, and where a token takes more than a few of the features sums are dense products of a block of
    tokens at a time. With k >= n all features are taken, and nothing is selected.

    Args:
        x: [N, D] float; needs no gradient, or gets one.
        W_enc: [D, n]; fastest as the transposed view of contiguous [n, D] memory.
        b_enc: [n].
        W_dec: [n, D_out].
        k: features a token may use, at least 1.
        backend: see `resolve_backend`.

    Returns:
        [N, D_out] float32 (float64 if an operand is); differentiable with respect to x and the weights, gradients in each
        operand's dtype. Zeros where n is 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or k is less than 1.
        BackendError: a forced backend cannot run.

    Source: Gao et al. 2024, arXiv 2406.04093, appendix A.2 (AuxK).
    """
    if k < 1:
        raise ValueError(f"auxk: k is {k}, needs at least 1")
    num_features = b_enc.numel()
    if 0 < k < num_features:
        code = encode_topk(x, W_enc, b_enc, k, backend=backend)
        return decode(code.values, code.indices, W_dec, backend=backend)
    check_operands("auxk", x, W_enc, b_enc, may_be_empty=True)
    if W_dec.ndim != 2 or len(W_dec) != num_features:
        raise ValueError(f"auxk: W_dec is {list(W_dec.shape)}, needs [n, D_out] with n = {num_features}")
    dtype = compute_dtype(x, W_enc, b_enc, W_dec)
    with without_autocast(x):
        acts = torch.addmm(b_enc.to(dtype), x.to(dtype), W_enc.to(dtype)).relu()
        return acts @ W_dec.to(dtype)
