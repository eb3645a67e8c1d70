"""Backends, devices and the independent truth that the kernel tests compare with."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from saekit_kernels import _build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Tolerance(NamedTuple):
    """Largest error allowed, as a fraction of the largest true value."""

    output: float
    gradient: float


# Outputs are float32 whatever the operands; gradients are rounded to the operands' dtype. Interpreted Triton truncates
# to bfloat16, which is one unit in the last place (2^-7) where rounding is half of one.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(3e-6, 3e-6),
    torch.bfloat16: Tolerance(3e-6, 1e-2),
    torch.float16: Tolerance(3e-6, 2e-3),
}


class Problem(NamedTuple):
    """Operands of one encode and decode, weights as the SAE stores them: W [F, D] for both directions."""

    x: Tensor
    W_enc_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        """Leaf copies that require gradients."""
        return Problem(*(tensor.detach().to(device, dtype).clone().requires_grad_() for tensor in self))

    def gradients(self) -> list[Tensor | None]:
        return [tensor.grad for tensor in self]


@pytest.fixture(scope="session", autouse=True)
def _untraced_interpreter() -> None:
    """Coverage leaves device code out, but its tracer would still be called for every line that the interpreter runs."""
    if importlib.util.find_spec("triton") is None or DEVICE != "cpu":
        return
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def untraced(self: Any, *arguments: Any, **options: Any) -> Any:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return launch(self, *arguments, **options)
        finally:
            sys.settrace(tracer)

    interpreter.GridExecutor.__call__ = untraced


def usable(name: str) -> str:
    """The backend's name; skips the test where it cannot run."""
    if name == "triton":
        pytest.importorskip("triton")
    if name in ("cpu", "compiled") and DEVICE != "cpu":
        pytest.skip("the tests' tensors are on the device")
    if name == "compiled" and (reason := _build.why_unavailable()):
        pytest.skip(f"no compiled kernels: {reason}")
    return name


@pytest.fixture(params=["reference", "cpu", "compiled", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; Triton interpreted where there is no device."""
    return usable(str(request.param))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton has no float64, and the compiled kernels have float32 alone: other combinations are no tests."""
    for item in list(items):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        dtype, name = parameters.get("dtype"), parameters.get("backend")
        if (name == "triton" and dtype == torch.float64) or (name == "compiled" and dtype not in (None, torch.float32)):
            items.remove(item)


@pytest.fixture(params=["cpu", "compiled", "triton"])
def fast_backend(request: pytest.FixtureRequest) -> str:
    """The backends that promise a sparse, reproducible backward."""
    return usable(str(request.param))


@pytest.fixture
def compiled_backend() -> str:
    """The compiled kernels, where there is a compiler."""
    return usable("compiled")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def tolerances() -> dict[torch.dtype, Tolerance]:
    return TOLERANCES


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """make_problem(N, D, F, dtype=..., seed=...): random operands in float64 that `dtype` represents exactly."""

    def make(num_tokens: int, d_in: int, d_sae: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(num_tokens, d_in), (d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,)]
        scales = [1.0, d_in**-0.5, 0.3, d_in**-0.5, 0.3]
        drawn = [
            torch.randn(s, generator=generator, dtype=torch.float64) * c for s, c in zip(shapes, scales, strict=True)
        ]
        return Problem(*(tensor.to(dtype).double() for tensor in drawn))

    return make


@pytest.fixture
def assert_close() -> Callable[[Tensor | None, Tensor | None, float], None]:
    """assert_close(found, true, tolerance): largest error at most `tolerance` of the largest true value."""

    def check(found: Tensor | None, true: Tensor | None, tolerance: float) -> None:
        assert found is not None
        assert true is not None
        assert found.shape == true.shape
        if true.numel() == 0:
            return
        found, true = found.detach().double().cpu(), true.detach().double().cpu()
        scale = true.abs().max().clamp(min=1e-30)
        error = (found - true).abs().max()
        assert error <= tolerance * scale, f"error {error:.3e} of {scale:.3e}, tolerance {tolerance}"

    return check


class Operators(TorchDispatchMode):
    """Records the names of the operators that ran, and the bytes of the largest tensor that any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.fixture
def operators() -> type[Operators]:
    """A context that records the operators of torch that run in it."""
    return Operators


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (or a huge integer), so that reading a place nobody wrote shows."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            return tensor
        bad = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2
        return tensor.fill_(bad)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, for what must not depend on how work is divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoders work through a few rows at a time, as they do with large dictionaries."""
    from saekit_kernels import _cpu

    monkeypatch.setattr(_cpu, "_CHUNK_ROWS", 4)
    monkeypatch.setattr(_cpu, "_MIN_CHUNK_ROWS", 4)
    if importlib.util.find_spec("triton"):
        from saekit_kernels import _product_triton

        monkeypatch.setattr(_product_triton, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(_product_triton, "_CHUNK_ROWS_STEP", 4)


@pytest.fixture
def short_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton cuts features of more than 8 entries into work items, as it does at 256."""
    if importlib.util.find_spec("triton"):
        from saekit_kernels import _decode_triton

        monkeypatch.setattr(_decode_triton, "MAX_ENTRIES", 8)
        monkeypatch.setattr(_decode_triton, "BLOCK_ENTRIES", 4)
