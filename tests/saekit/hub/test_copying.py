"""Weights as they are copied from files: values, layout, NaN, and that nothing copies them again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saekit.hub.copying import checked_copy
from saekit.hub.release import Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (5, 3), (4, 4), (1, 9), (2, 3, 4), (0, 3), (3, 0)])
def test_copy_holds_the_same_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stored = torch.randn(shape).to(dtype)
    copy, is_finite = checked_copy(stored)
    assert is_finite
    assert copy.dtype == torch.float32
    assert torch.equal(copy, stored.float())
    assert copy.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr() or not stored.numel()


def test_blocks_meet_without_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saekit.hub.copying._BLOCK_ELEMENTS", 20)
    for shape in ((11, 7), (7, 11), (50,), (3, 4, 5)):
        stored = torch.randn(shape)
        assert torch.equal(checked_copy(stored)[0], stored)


def test_matrices_have_their_longer_axis_first_in_memory() -> None:
    assert checked_copy(torch.randn(3, 5))[0].T.is_contiguous()
    assert checked_copy(torch.randn(5, 3))[0].is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_numbers_that_float32_does_not_have_are_noticed(bad: float) -> None:
    stored = torch.zeros(40, 30, dtype=torch.float64)
    stored[37, 2] = bad
    assert not checked_copy(stored)[1]
    assert not checked_copy(stored[37, 2])[1]


def test_building_a_dictionary_copies_no_matrix_again(tmp_path: Path) -> None:
    save_file(
        {"W_enc": torch.randn(6, 40).bfloat16(), "W_dec": torch.randn(40, 6).bfloat16()}, tmp_path / "a.safetensors"
    )
    weights = Weights([tmp_path / "a.safetensors"])
    encoder = weights.take("W_enc", 6, 40)
    assert encoder.T.contiguous().data_ptr() == encoder.data_ptr()
    assert weights.take("W_dec", 40, 6).is_contiguous()


@pytest.mark.parametrize("shape", [(3, 70), (70, 3)], ids=str)
def test_half_precision_is_kept_where_it_is_asked_for(shape: tuple[int, int]) -> None:
    stored = torch.randn(shape).to(torch.bfloat16)
    copy, is_finite = checked_copy(stored, torch.bfloat16)
    assert is_finite
    assert copy.dtype == torch.bfloat16
    assert torch.equal(copy, stored)
    stored[-1, -1] = torch.nan
    assert not checked_copy(stored, torch.bfloat16)[1]
