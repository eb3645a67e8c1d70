"""Every released kind takes batches of any shape, none included, in any precision, and its two codes are one."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saekit.hub import load_sae, load_saes
from saekit.sae.base import SAE
from saekit.sae.multilayer import MultiLayerDictionary
from saekit.sae.sequence import SequenceSAE

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
NAMES = [entry["name"] for entry in json.loads((FIXTURES / "MANIFEST.json").read_text(encoding="utf-8"))]


def first(name: str, dtype: torch.dtype | None = None) -> SAE:
    found = load_saes(FIXTURES / name, dtype=dtype)
    return next(iter(found.values()))


def batch(sae: SAE, *outer: int) -> Tensor:
    layers = (sae.cfg.num_layers_in,) if isinstance(sae, MultiLayerDictionary) else ()
    return torch.randn(*outer, *layers, sae.d_in, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_outer_shape_of_a_batch_is_kept(name: str) -> None:
    sae = first(name)
    tokens = batch(sae, 2, 3)
    acts = sae.encode(tokens)
    assert acts.shape[:2] == (2, 3)
    if not isinstance(sae, SequenceSAE) and sae.cfg.model_dump()["activation"]["kind"] != "batchtopk":
        assert torch.allclose(acts[1, 2], sae.encode(tokens[1, 2]), atol=1e-5)
    for outer in ((0,), (2, 0)):
        none = batch(sae, *outer)
        assert sae.encode(none).shape[: len(outer)] == outer
        assert sae.encode_sparse(none)[0].shape[0] == 0
        assert sae(none).x_hat.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_codes_agree_in_every_precision(name: str, dtype: torch.dtype) -> None:
    sae = first(name, dtype)
    x = batch(sae, 5)
    acts, (top_acts, top_indices) = sae.encode(x), sae.encode_sparse(x)
    dense = top_acts.new_zeros(len(top_acts), acts.numel() // len(top_acts)).scatter_add(1, top_indices, top_acts)
    assert {acts.dtype, top_acts.dtype, sae(x).x_hat.dtype} == {dtype}
    assert torch.equal(dense, acts.reshape(dense.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_read_in_the_dictionarys_precision(dtype: torch.dtype) -> None:
    sae = first("saelens_v6_jumprelu")
    x = batch(sae, 7).to(dtype)
    assert torch.equal(sae.encode(x), sae.encode(x.float()))


@pytest.mark.parametrize("fixture", ["saelens_v6_standard_hook_z", "connor_attn", "gemmascope2_attn_out"])
def test_heads_are_joined_where_the_release_reads_them_apart(fixture: str) -> None:
    sae = load_sae(FIXTURES / fixture)
    apart = torch.randn(2, 3, 4, sae.d_in // 4)
    assert torch.equal(sae.encode(apart), sae.encode(apart.flatten(2)))
    assert torch.equal(sae(apart).x_hat, sae(apart.flatten(2)).x_hat)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 5, 8\], needs"):
        sae.encode(torch.randn(2, 3, 5, 8))


def test_heads_apart_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[3, 4, 8\], needs"):
        load_sae(FIXTURES / "saelens_v6_standard").encode(torch.randn(3, 4, 8))
