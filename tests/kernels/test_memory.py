"""Arrays in large pages are ordinary arrays."""

import pytest
import torch
from saekit_kernels import _memory


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (3, 1 << 19), (1 << 21,)], ids=str)
def test_array_has_shape_and_dtype_and_can_be_written(shape: tuple[int, ...]) -> None:
    made = _memory.empty(*shape, dtype=torch.float32)
    assert made.shape == shape
    assert made.dtype == torch.float32
    assert torch.equal(made.fill_(2.0), torch.full(shape, 2.0))


def test_other_systems_get_ordinary_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    _memory._madvise.cache_clear()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert _memory._madvise() is None
    assert _memory.empty(2, 1 << 20, dtype=torch.float64).shape == (2, 1 << 20)
    _memory._madvise.cache_clear()


def test_advice_covers_whole_pages_inside_the_array_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(_memory, "_madvise", lambda: lambda address, size, advice: asked.append((address, size)) or 0)
    small, large = _memory.empty(100, dtype=torch.float32), _memory.empty(3 << 20, dtype=torch.float32)
    ((address, size),) = asked
    assert small.numel() == 100
    assert address % (1 << 21) == size % (1 << 21) == 0
    assert large.data_ptr() <= address
    assert address + size <= large.data_ptr() + (12 << 20)
