"""Which of the two top-k encoders in Triton runs: both are timed once per shape, dtype and device, and the faster one is kept.

"fused" writes two entries of every 32; "two-kernel" writes pre-activations, a chunk of rows at a time, and reads the best groups
again. Which is faster depends on how wide the rows are against how many features there are.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from saekit_kernels import _encode_triton, _fused_triton
from saekit_kernels.backend import BackendError

Encoder = Literal["fused", "two-kernel"]

ENVIRONMENT_VARIABLE = "SAEKIT_KERNELS_ENCODER"
# Timed calls of each after one that compiles; the least counts.
_ROUNDS = 3

_log = logging.getLogger(__name__)
_TOPK: dict[Encoder, Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "fused": _fused_triton.topk,
    "two-kernel": _encode_triton.topk,
}
_chosen: dict[tuple[object, ...], Encoder] = {}


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `Primitives.topk`. The first call with a shape times both encoders, which waits for the device."""
    return _TOPK[encoder_for(x, weight, bias, k)](x, weight, bias, k)


def encoder_for(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Encoder:
    """The encoder that a call with these arguments uses.

    SAEKIT_KERNELS_ENCODER forces one. Where none is forced, "two-kernel" serves shapes that "fused" cannot, interpreted calls,
    and calls inside a CUDA graph whose shape was not met before it.

    Raises:
        BackendError: the variable names none of them, or one that cannot serve this shape.
    """
    is_possible = _fused_triton.is_possible(len(weight), k)
    if forced := os.environ.get(ENVIRONMENT_VARIABLE):
        for name in get_args(Encoder):
            if forced == name and (is_possible or name != "fused"):
                return _named(name)
        needs = "k <= d_sae / 32" if forced == "fused" else f"one of {', '.join(get_args(Encoder))}"
        raise BackendError(f"{ENVIRONMENT_VARIABLE}: {forced!r} with d_sae {len(weight)} and k {k}, needs {needs}")
    if not is_possible or x.device.type != "cuda" or not len(x):
        return "two-kernel"
    # Of near sizes of the batch the choice is the same.
    key = (x.device, x.dtype, weight.dtype, len(x).bit_length(), weight.shape, k)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return "two-kernel"
        _chosen[key] = _faster(x, weight, bias, k)
    return _chosen[key]


def _faster(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Encoder:
    times = {name: _milliseconds(functools.partial(run, x, weight, bias, k)) for name, run in _TOPK.items()}
    _log.info("top-k encoder for N %d, d_sae %d, k %d: %s ms", len(x), len(weight), k, times)
    return min(times, key=lambda name: times[name])


def _milliseconds(run: Callable[[], object]) -> float:
    run()
    least = float("inf")
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        start.record()
        run()
        end.record()
        end.synchronize()
        least = min(least, start.elapsed_time(end))
    return least


def _named(name: str) -> Encoder:
    return next(encoder for encoder in _TOPK if encoder == name)
