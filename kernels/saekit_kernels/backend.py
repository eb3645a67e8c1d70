"""Which implementation runs: chosen per call from the tensors, or forced by argument or by the environment."""

import functools
import importlib
import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor

from saekit_kernels import _build

if TYPE_CHECKING:
    from saekit_kernels.primitives import Primitives

Backend = Literal["auto", "triton", "compiled", "cpu", "reference"]
ResolvedBackend = Literal["triton", "compiled", "cpu", "reference"]

ENVIRONMENT_VARIABLE = "SAEKIT_KERNELS"

_log = logging.getLogger(__name__)

_MODULES: dict[ResolvedBackend, str] = {
    "triton": "saekit_kernels._triton",
    "compiled": "saekit_kernels._compiled",
    "cpu": "saekit_kernels._cpu",
    "reference": "saekit_kernels.reference",
}


class BackendError(RuntimeError):
    """A backend that does not exist, or that was asked for and cannot run on the given tensors."""


def resolve_backend(backend: Backend = "auto", *tensors: Tensor) -> ResolvedBackend:
    """Name of the implementation that a call with these arguments uses.

    Args:
        backend: "auto" takes Triton for CUDA tensors where triton imports; for float32 CPU tensors the compiled kernels,
            which the first such call builds, and torch operators where they cannot be built (said once); torch operators
            for other CPU tensors; and the reference for everything else (float64 on CUDA, other devices). The environment
            variable SAEKIT_KERNELS replaces "auto" (and only "auto").
        tensors: the operands of the call; they decide what is usable.

    Raises:
        BackendError: the name is unknown, or a backend is forced that cannot run on these tensors.
    """
    source = "backend"
    if backend == "auto" and (forced := os.environ.get(ENVIRONMENT_VARIABLE)):
        backend, source = cast(Backend, forced), ENVIRONMENT_VARIABLE
    if backend not in get_args(Backend):
        raise BackendError(f"{source}: {backend!r}, needs one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        return _automatic(tensors)
    if reason := _why_unusable(backend, tensors):
        raise BackendError(f"{source} {backend!r}: {reason}")
    return backend


def load_primitives(backend: ResolvedBackend) -> "Primitives":
    """The module that implements a backend; imported at its first use."""
    return cast("Primitives", importlib.import_module(_MODULES[backend]))


def _automatic(tensors: tuple[Tensor, ...]) -> ResolvedBackend:
    kinds = {tensor.device.type for tensor in tensors}
    if kinds <= {"cpu"}:
        is_float32 = all(tensor.dtype == torch.float32 for tensor in tensors)
        return "compiled" if is_float32 and _build.why_unavailable(notify=True) is None else "cpu"
    if kinds == {"cuda"}:
        reason = _why_unusable("triton", tensors)
        if reason is None:
            return "triton"
        _notify(reason)
    return "reference"


@functools.cache
def _notify(reason: str) -> None:
    _log.warning("Triton kernels cannot be used: %s; going on with dense torch operators, slower and larger", reason)


def _why_unusable(backend: ResolvedBackend, tensors: tuple[Tensor, ...]) -> str | None:
    devices = sorted({str(tensor.device) for tensor in tensors})
    if backend in ("cpu", "compiled") and any(tensor.device.type != "cpu" for tensor in tensors):
        return f"tensors are on {', '.join(devices)}, needs tensors on cpu"
    if backend == "compiled":
        other = sorted({str(tensor.dtype) for tensor in tensors if tensor.dtype != torch.float32})
        return f"a tensor is {other[0]}, needs torch.float32" if other else _build.why_unavailable()
    if backend == "triton":
        return _why_triton_is_unusable(tensors, devices)
    return None


def _why_triton_is_unusable(tensors: tuple[Tensor, ...], devices: list[str]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux with a CUDA device)"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "a tensor is float64, needs float32, bfloat16 or float16"
    if all(tensor.device.type == "cuda" for tensor in tensors):
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"tensors are on {', '.join(devices)}, needs CUDA tensors (or TRITON_INTERPRET=1, to debug)"
