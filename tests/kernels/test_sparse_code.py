"""The reverse index: its contents, who shares it, and how long it lives."""

import gc

import pytest
import saekit_kernels as sk
import torch
from saekit_kernels import sparse_code


@pytest.mark.parametrize("layout", ["pairs", "csr"])
def test_reverse_index_lists_each_features_tokens_in_order(layout: str) -> None:
    indices = torch.tensor([[2, 0], [2, 2], [4, 0]])
    offsets = None
    if layout == "csr":
        indices, offsets = indices.flatten(), torch.tensor([0, 2, 4, 6])
    reverse = sk.reverse_index(indices, 5, offsets=offsets)
    assert reverse.offsets.tolist() == [0, 2, 2, 5, 5, 6]
    assert reverse.order.tolist() == [1, 5, 0, 2, 3, 4]
    assert reverse.rows.tolist() == [0, 2, 0, 1, 1, 2]


def test_reverse_index_of_rows_of_any_length() -> None:
    reverse = sk.reverse_index(torch.tensor([1, 0, 1]), 2, offsets=torch.tensor([0, 0, 1, 3]))
    assert reverse.rows.tolist() == [2, 1, 2]


def test_reverse_index_is_shared_by_the_same_tensor_only() -> None:
    indices = torch.tensor([[1, 0]])
    reverse = sk.reverse_index(indices, 3)
    assert sk.reverse_index(indices, 3) is reverse
    assert sk.reverse_index(indices, 4) is not reverse
    assert sk.reverse_index(indices.clone(), 3) is not reverse


def test_reverse_index_is_made_anew_for_other_offsets() -> None:
    indices = torch.tensor([1, 0, 1])
    first = sk.reverse_index(indices, 2, offsets=torch.tensor([0, 1, 3]))
    assert sk.reverse_index(indices, 2, offsets=torch.tensor([0, 1, 3])) is first
    assert first.rows.tolist() == [1, 0, 1]
    assert sk.reverse_index(indices, 2, offsets=torch.tensor([0, 2, 3])).rows.tolist() == [0, 0, 1]


def test_reverse_index_is_made_anew_after_a_change_in_place() -> None:
    indices = torch.tensor([[1, 0]])
    assert sk.reverse_index(indices, 2).order.tolist() == [1, 0]
    indices.copy_(torch.tensor([[0, 1]]))
    assert sk.reverse_index(indices, 2).order.tolist() == [0, 1]


def test_reverse_index_dies_with_the_code_and_its_graph() -> None:
    gc.collect()
    before = len(sparse_code._known)
    x, W = torch.randn(4, 3), torch.randn(3, 9, requires_grad=True)
    code = sk.encode_topk(x, W, torch.zeros(9), 2)
    loss = sk.decode(code.values, code.indices, torch.randn(9, 3)).sum()
    assert len(sparse_code._known) == before + 1
    loss.backward()
    del code, loss
    gc.collect()
    assert len(sparse_code._known) == before


def test_ops_run_in_inference_mode() -> None:
    with torch.inference_mode():
        code = sk.encode_topk(torch.randn(4, 3), torch.randn(3, 9), torch.zeros(9), 2)
        assert sk.decode(code.values, code.indices, torch.randn(9, 3)).shape == (4, 3)
