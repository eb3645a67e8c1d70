"""The folder of an SAE: what is written, and what broken folders say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.errors import FormatError, ResourceError
from saekit.sae import TopKConfig, TopKSAE, load_sae_folder

Edit = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2), hook_point="model.layers.3").save(tmp_path / "sae")
    return tmp_path / "sae"


def test_files_hold_float32_in_public_orientation(folder: Path) -> None:
    tensors = load_file(folder / "sae.safetensors")
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        "W_enc": [6, 10],
        "b_enc": [10],
        "W_dec": [10, 6],
        "b_dec": [6],
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(10))
    header = json.loads((folder / "cfg.json").read_text())
    assert header["hook_point"] == "model.layers.3"
    assert header["sae"] == {"kind": "topk", "d_in": 6, "d_sae": 10, "k": 2, "apply_b_dec_to_input": True}
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae.safetensors"]


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "sae.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae.safetensors")

    return edit


def change_header(**values: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def cut(name: str, size: int) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return edit


def remove(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(remove("cfg.json"), "no cfg.json, needs a folder that SAE.save wrote", id="no-cfg"),
        pytest.param(remove("sae.safetensors"), "no sae.safetensors, needs a folder", id="no-weights"),
        pytest.param(cut("cfg.json", 20), "cfg.json': cannot be read as JSON", id="cut-cfg"),
        pytest.param(
            cut("sae.safetensors", 200), "sae.safetensors': cannot be read: .*, needs an unbroken", id="cut-weights"
        ),
        pytest.param(cut("sae.safetensors", 0), "sae.safetensors': cannot be read", id="empty-weights"),
        pytest.param(change_header(format="other"), "not a config of saekit", id="other-format"),
        pytest.param(change_header(format_version=99), "format_version 99, needs 1; update saekit", id="newer-format"),
        pytest.param(change_header(sae={"kind": "other"}), "cfg.json': sae.*'other'", id="unknown-kind"),
        pytest.param(change_header(sae={"kind": "topk", "d_sae": 10}), "sae.topk.k: ", id="no-k"),
        pytest.param(
            change_header(sae={"kind": "topk", "d_sae": 10, "k": 2}), "d_in is 0, needs the width", id="no-width"
        ),
        pytest.param(
            change_header(sae={"kind": "topk", "d_in": 7, "d_sae": 10, "k": 2}),
            r"W_enc is \[6, 10\], needs \[7, 10\]",
            id="other-width",
        ),
        pytest.param(
            change_header(sae={"kind": "jumprelu", "d_in": 6, "d_sae": 10}),
            r"has \['W_dec', 'W_enc', 'b_dec', 'b_enc'\], needs also threshold",
            id="other-kind",
        ),
        pytest.param(change_tensors(lambda t: t.pop("b_dec")), "needs also b_dec", id="missing-tensor"),
        pytest.param(
            change_tensors(lambda t: t["W_dec"].__setitem__((3, 2), float("nan"))), "W_dec has NaN or Inf", id="nan"
        ),
        pytest.param(
            change_tensors(lambda t: t["b_enc"].__setitem__(1, float("inf"))), "b_enc has NaN or Inf", id="inf"
        ),
        pytest.param(
            change_tensors(lambda t: t.__setitem__("b_enc", t["b_enc"].long())), "not floating point", id="integers"
        ),
    ],
)
def test_broken_folder_is_refused_in_one_line(folder: Path, edit: Edit, message: str) -> None:
    edit(folder)
    with pytest.raises(FormatError, match=message) as caught:
        load_sae_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_saved(folder: Path) -> None:
    sae = load_sae_folder(folder)
    with torch.no_grad():
        sae.b_enc[0] = float("nan")
    before = (folder / "sae.safetensors").read_bytes()
    with pytest.raises(FormatError, match="b_enc has NaN or Inf"):
        sae.save(folder)
    assert (folder / "sae.safetensors").read_bytes() == before


def test_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written"):
        TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2)).save(tmp_path / "file" / "sae")
