"""Nearest features by decoder cosine against a plain full cosine matrix."""

import numpy as np
import pytest
import torch

from saekit.evaluation.decoder import NUM_NEIGHBORS, decoder_neighbors


@pytest.mark.parametrize("block_bytes", [1, 4 * 40 * 7, 2**20], ids=["a row", "seven rows", "all rows"])
def test_decoder_neighbors_equal_the_full_matrix(block_bytes: int) -> None:
    W_dec = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * torch.rand(40, 1).mul(9).add(0.1)
    found = decoder_neighbors(W_dec, block_bytes=block_bytes)
    w = W_dec.double().numpy()
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    cosines = w @ w.T
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1)[:, :NUM_NEIGHBORS]
    np.testing.assert_array_equal(found.indices.numpy(), order)
    np.testing.assert_allclose(found.cosines.numpy(), np.take_along_axis(cosines, order, 1), atol=1e-6)


def test_decoder_neighbors_pad_small_dictionaries() -> None:
    found = decoder_neighbors(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]]))
    assert found.indices[:, 2:].eq(-1).all()
    assert found.cosines[:, 2:].eq(0).all()
    assert found.indices[0, :2].tolist() == [1, 2]
    assert found.cosines[0, :2].tolist() == pytest.approx([0.5**0.5, -1.0])


def test_decoder_neighbors_of_one_feature_are_none() -> None:
    found = decoder_neighbors(torch.ones(1, 4))
    assert found.indices.eq(-1).all()


def test_decoder_neighbors_of_a_zero_row_have_cosine_zero() -> None:
    found = decoder_neighbors(torch.cat([torch.zeros(1, 3), torch.eye(3)]))
    assert found.cosines[0].eq(0).all()
    assert torch.isfinite(found.cosines).all()


def test_decoder_neighbors_find_a_twin() -> None:
    W_dec = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    W_dec[13] = 3 * W_dec[4]
    found = decoder_neighbors(W_dec)
    assert found.indices[13, 0] == 4
    assert found.indices[4, 0] == 13
    assert found.cosines[4, 0].item() == pytest.approx(1.0, abs=1e-6)
