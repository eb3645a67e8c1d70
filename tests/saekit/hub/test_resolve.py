"""From a reference to an SAE, and what references that name nothing say."""

from pathlib import Path

import pytest
import torch

from saekit.errors import FormatError
from saekit.hub import load_sae
from saekit.manifest import begin_stage
from saekit.sae import TopKConfig, TopKSAE


def test_folder_of_an_sae_is_loaded(tmp_path: Path) -> None:
    sae = TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2), seed=3)
    sae.save(tmp_path)
    for ref in (tmp_path, str(tmp_path)):
        assert torch.equal(load_sae(ref).W_dec, sae.W_dec)


def test_folder_above_several_names_them(tmp_path: Path) -> None:
    for name in ("first", "second"):
        TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2)).save(tmp_path / name)
    with pytest.raises(FormatError, match=r"holds 2 SAE folders, needs one; use '.*first', '.*second'"):
        load_sae(tmp_path)


def test_unfinished_training_says_how_to_go_on(tmp_path: Path) -> None:
    begin_stage(tmp_path, "train", {})
    with pytest.raises(FormatError, match="training has not finished; run it again to resume it"):
        load_sae(tmp_path)


@pytest.mark.parametrize("ref", ["google/gemma-scope-2b-pt-res", "runs/none"])
def test_reference_that_is_no_folder_says_what_is_read(ref: str) -> None:
    with pytest.raises(FormatError, match="no such folder, needs the output folder of a training run"):
        load_sae(ref)


def test_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no cfg.json, needs the output folder"):
        load_sae(tmp_path)
