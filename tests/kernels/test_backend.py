"""Which implementation runs, and what is said when the wanted one cannot."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import _build, backend


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAEKIT_KERNELS", raising=False)


@pytest.fixture
def compiled_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user: Triton does not interpret."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def on(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that only claims to be on a device: the choice reads nothing but its type."""

    class Claim(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device(device)

    return torch.zeros(1, dtype=dtype).as_subclass(Claim)


@pytest.mark.parametrize(
    "device,dtype,expected",
    [
        ("cpu", torch.float64, "cpu"),
        ("cpu", torch.bfloat16, "cpu"),
        ("cuda:1", torch.bfloat16, "triton"),
        ("cuda:1", torch.float64, "reference"),
        ("mps", torch.float32, "reference"),
    ],
    ids=["cpu-float64", "cpu-bfloat16", "cuda", "cuda-float64", "other"],
)
def test_auto_follows_the_tensors(compiled_triton: None, device: str, dtype: torch.dtype, expected: str) -> None:
    pytest.importorskip("triton")
    assert sk.resolve_backend("auto", on(device, dtype)) == expected


def test_auto_on_cuda_without_triton_is_the_reference(compiled_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert sk.resolve_backend("auto", on("cuda:0")) == "reference"


def test_auto_takes_the_compiled_kernels_for_float32_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "why_unavailable", lambda **_: None)
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert sk.resolve_backend("auto", single) == "compiled"
    assert sk.resolve_backend("auto", single, double) == "cpu"


def test_auto_takes_torch_operators_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "why_unavailable", lambda **_: "there is no C++ compiler")
    assert sk.resolve_backend("auto", torch.zeros(1)) == "cpu"


def test_forced_compiled_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sk.BackendError, match=r"backend 'compiled': a tensor is torch.float64, needs torch.float32"):
        sk.resolve_backend("compiled", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(sk.BackendError, match="backend 'compiled': tensors are on cuda:0, needs tensors on cpu"):
        sk.resolve_backend("compiled", on("cuda:0"))
    monkeypatch.setattr(_build, "why_unavailable", lambda **_: "there is no C++ compiler")
    with pytest.raises(sk.BackendError, match=r"backend 'compiled': there is no C\+\+ compiler"):
        sk.resolve_backend("compiled", torch.zeros(1))


@pytest.mark.parametrize("forced", ["reference", "cpu"])
def test_environment_overrides_auto_and_only_auto(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    monkeypatch.setenv("SAEKIT_KERNELS", forced)
    assert sk.resolve_backend("auto", torch.zeros(1)) == forced
    assert sk.resolve_backend("reference", torch.zeros(1)) == "reference"


def test_forced_backend_is_used_by_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    from saekit_kernels import reference

    original = reference.gather_sum
    monkeypatch.setattr(reference, "gather_sum", lambda *a, **k: used.append("reference") or original(*a, **k))
    operands = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 4)
    sk.decode(*operands)
    assert used == []
    monkeypatch.setenv("SAEKIT_KERNELS", "reference")
    sk.decode(*operands)
    assert used == ["reference"]


def test_unknown_backend_is_refused_with_the_source_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        sk.BackendError, match=r"^backend: 'cuda', needs one of auto, triton, compiled, cpu, reference$"
    ):
        sk.resolve_backend("cuda")  # type: ignore[arg-type]
    monkeypatch.setenv("SAEKIT_KERNELS", "fast")
    with pytest.raises(sk.BackendError, match=r"^SAEKIT_KERNELS: 'fast', needs one of"):
        sk.resolve_backend("auto")


def test_forced_cpu_refuses_other_devices() -> None:
    with pytest.raises(sk.BackendError, match="backend 'cpu': tensors are on cuda:0, needs tensors on cpu"):
        sk.resolve_backend("cpu", on("cuda:0"))


def test_forced_triton_says_why_it_cannot_run(compiled_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(sk.BackendError, match="backend 'triton': tensors are on cpu, needs CUDA tensors"):
        sk.resolve_backend("triton", torch.zeros(1))
    with pytest.raises(sk.BackendError, match="a tensor is float64"):
        sk.resolve_backend("triton", on("cuda:0", torch.float64))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sk.BackendError, match="triton is not installed; pip install triton"):
        sk.resolve_backend("triton", on("cuda:0"))


def test_importing_the_package_loads_no_triton() -> None:
    program = (
        "import sys, saekit_kernels; print(sorted(m for m in sys.modules if m.split('.')[0] in ('triton', 'saekit')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_path())
    assert done.stdout.strip() == "[]"


def _path() -> dict[str, str]:
    import os
    from pathlib import Path

    return {**os.environ, "PYTHONPATH": str(Path(sk.__file__).parents[1])}


def test_dense_operators_on_a_gpu_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    operand = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    backend._notify.cache_clear()
    for _ in range(3):
        assert sk.resolve_backend("auto", operand) == "reference"  # type: ignore[arg-type]  # what is looked at, without a GPU
    assert [record.message for record in caplog.records] == [
        "Triton kernels cannot be used: triton is not installed; pip install triton (Linux with a CUDA device);"
        " going on with dense torch operators, slower and larger"
    ]
