"""Files made to mislead: names twice, numbers without end, values without a bottom, links out of the folder."""

import hashlib
import io
import json
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saekit.errors import FormatError
from saekit.hub import load_sae
from saekit.hub.discover import dictionaries
from saekit.hub.release import read_mapping
from saekit.hub.strict import parse_yaml
from saekit.sae import TopKConfig, TopKSAE

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
Changed = Callable[..., Path]
WEIGHTS = {"W_enc": (4, 8), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,), "b_dec_out": (4,)}


def refused(path: Path, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a safetensors header"),
        (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', "not a safetensors header"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', r"'a' \[-1\] takes -4 bytes"),
        (b'{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}', "'a' is 'F8_E4M3', needs float64"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
            r"not a safetensors header \(names 'a' twice\)",
        ),
        (
            b'{"\\u001b[2Ja\\nb": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            r"no known format has '\\x1b\[2Ja\\nb \[1\]'",
        ),
        (b"[]", "not a safetensors header"),
    ],
)
def test_header_that_misleads_is_refused(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "sae.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    refused(tmp_path, message)


def test_header_of_many_megabytes_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "sae.safetensors").open("wb") as file:
        file.write((30_000_000).to_bytes(8, "little"))
        file.truncate(30_000_012)
    refused(tmp_path, "30000012 bytes, needs a safetensors header and its data")


def pickled(folder: Path, program: bytes) -> Path:
    with zipfile.ZipFile(folder / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    return folder / "a.pt"


@pytest.mark.parametrize(
    ("program", "named"),
    [
        # A few bytes that ask for a tebibyte of zeros, by a class that torch's own list admits.
        (b"\x80\x02}U\x01acbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85Rs.", r"builtins\.bytearray"),
        (b"\x80\x02}U\x01ac__builtin__\neval\nU\x011\x85Rs.", r"builtins\.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "by STACK_GLOBAL"),
        (b"(S'ls'\nios\nsystem\n.", r"os\.system"),
    ],
)
def test_pickle_is_refused_by_what_it_names_before_it_is_read(
    program: bytes, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", None)
    refused(pickled(tmp_path, program), rf"a\.pt': pickled {named}, needs tensors, numbers and texts only")


def weights() -> dict[str, Any]:
    return {name: torch.ones(shape) for name, shape in WEIGHTS.items()}


def test_pickle_whose_error_holds_control_characters_is_one_line(tmp_path: Path) -> None:
    refused(pickled(tmp_path, b"\x80\x02}U\x05\x1b[2Ja\x1b"), r"a\.pt': .*needs an unbroken file of torch\.save")
    (tmp_path / "b.yaml").write_text("\x1b[2J", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_mapping(tmp_path / "b.yaml")
    assert str(caught.value).isprintable()


def test_pickled_values_that_have_no_end_are_refused(tmp_path: Path) -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    torch.save(weights() | {"x": cyclic}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "config: Circular reference detected, needs values that JSON can hold")
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        torch.save(weights() | {"x": deep}, tmp_path / "b.pt")
    finally:
        sys.setrecursionlimit(limit)
    refused(tmp_path / "b.pt", "config: maximum recursion depth exceeded .*, needs values that JSON can hold")


def test_pickled_keys_that_json_has_not_are_left_out_of_the_record(tmp_path: Path) -> None:
    torch.save(weights() | {"x": {(1, 2): 3, "kept": 4}}, tmp_path / "a.pt")
    source = load_sae(tmp_path / "a.pt").source
    assert source["metadata"] == {"pickled": {"x": {"kept": 4}}}


def test_name_that_a_prefix_hides_is_refused(tmp_path: Path) -> None:
    torch.save(weights() | {"_orig_mod.W_enc": torch.zeros(4, 8)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "6 entries, 5 names; needs each once")


@pytest.mark.parametrize("value", [torch.zeros(4, 8).to_sparse(), torch.empty(4, 8, device="meta")])
def test_tensor_of_another_make_is_refused(value: torch.Tensor, tmp_path: Path) -> None:
    torch.save(weights() | {"W_enc": value}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"pickled torch\._utils\._rebuild_\w+.*, needs tensors, numbers and texts only")


def test_array_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gemmascope_res", tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob("params.npz")
    content = io.BytesIO()
    np.save(content, np.zeros((2, 2), dtype=np.float32))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("W_enc.npy", content.getvalue())
    refused(tmp_path, "6 arrays, 5 names; needs each once")


@pytest.mark.parametrize(
    ("fixture", "old", "new", "message"),
    [
        ("llamascope_res", '"in": 3.0', '"in": NaN', "config: in is nan, needs a finite number"),
        ("llamascope_res", '"in": 3.0', '"in": Infinity', "config: in is inf, needs a finite number"),
        ("llamascope_res", '"in": 3.0', '"in": 1e-300', r"a scale of 5\.6\d+e\+300, needs one between"),
        ("llamascope_res", '"in": 3.0', '"in": 1' + "0" * 400, "OverflowError: int too large"),
        ("llamascope_res", "0.35", "-Infinity", "config: jump_relu_threshold is -inf, needs a finite number"),
        ("saelens_v6_topk", '"k": 8', '"k": 8, "k": 3', r"cfg\.json': cannot be read: names 'k' twice"),
        ("saelens_v6_topk", '"k": 8', '"k": 8, "z": ' + "[" * 10**5 + "]" * 10**5, "nested too deeply"),
        ("saelens_v6_topk", '"k": 8', '"k": 8, "z": "' + "x" * 10**6 + '"', "bytes are too many"),
        (
            "sof_crosscoder",
            '"num_layers": 2',
            '"num_layers": 1000000000',
            "num_layers is 1000000000, the weights need 2",
        ),
    ],
)
def test_config_of_numbers_without_bounds_is_refused(
    fixture: str, old: str, new: str, message: str, changed: Changed
) -> None:
    folder = changed(fixture)
    for path in [*folder.rglob("*config.json"), *folder.rglob("cfg.json"), *folder.rglob("hyperparams.json")]:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
    refused(folder, message)


def test_layers_without_bounds_are_not_allocated(changed: Changed) -> None:
    config = {"encoder_layers": [0, 1], "num_layers": 10**9, "num_decoder_layers": None}
    refused(changed("sof_crosscoder", config), r"reads layers \[0, 1\] of 1000000000, the weights need 2")


def test_yaml_that_names_a_key_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="names 'k' twice"):
        parse_yaml("a:\n  - {k: 1, k: 2}")


@pytest.mark.parametrize(
    ("fixture", "tensor"),
    [("llamascopium_sae_jumprelu", "activation_function.log_jumprelu_threshold"), ("saelens_v5_gated", "r_mag")],
)
def test_weights_that_overflow_when_they_are_used_are_refused(fixture: str, tensor: str, changed: Changed) -> None:
    refused(
        changed(fixture, tensors={tensor: torch.full((128,), 1000.0)}), "needs finite thresholds|has NaN or Inf after"
    )


@pytest.mark.parametrize("linked", ["sae_weights.safetensors", "cfg.json"])
def test_link_out_of_the_folder_is_refused(linked: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "release", tmp_path / "elsewhere"
    shutil.copytree(FIXTURES / "saelens_v6_topk", folder)
    elsewhere.mkdir()
    shutil.move(folder / linked, elsewhere / linked)
    (folder / linked).symlink_to(elsewhere / linked)
    refused(folder, f"{linked}': a link to '.*elsewhere/{linked}', needs a file inside '.*release'")
    (folder / linked).unlink()
    shutil.move(elsewhere / linked, folder / f"real-{linked}")
    (folder / linked).symlink_to(f"real-{linked}")
    if linked == "cfg.json":
        assert load_sae(folder).d_sae == 128


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "c0ffee" / "sae"
    shutil.copytree(FIXTURES / "saelens_v6_topk", snapshot)
    (home / "blobs").mkdir()
    for name in ("sae_weights.safetensors", "cfg.json"):
        shutil.move(snapshot / name, home / "blobs" / name)
        (snapshot / name).symlink_to(f"../../../blobs/{name}")
    assert load_sae(snapshot).d_sae == 128


def test_listing_that_names_other_places_is_cut() -> None:
    names = ["../x/sae.safetensors", "/etc/sae.safetensors", "a/../../sae.safetensors", "b/sae.safetensors"]
    assert dictionaries(names) == {"b": ("b/sae.safetensors",)}


def test_sha256_of_a_config_can_be_demanded(changed: Changed) -> None:
    folder = changed("saelens_v6_topk")
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("cfg.json", "sae_weights.safetensors")
    }
    assert load_sae(folder, sha256=digests).source["files"] == digests
    (folder / "cfg.json").write_text((folder / "cfg.json").read_text() + " ", encoding="utf-8")
    with pytest.raises(FormatError, match=r"cfg\.json has sha256 \w+, needs \w+; it is not the file you mean"):
        load_sae(folder, sha256=digests)


def test_own_folder_whose_config_asks_for_more_than_its_weights_is_refused_before_it_is_made(tmp_path: Path) -> None:
    TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2)).save(tmp_path)
    path = tmp_path / "cfg.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    header["sae"]["d_sae"] = 10**9
    path.write_text(json.dumps(header), encoding="utf-8")
    refused(tmp_path, r"W_enc is \[6, 10\], needs \[6, 1000000000\]")


def test_own_folder_with_tensors_that_do_not_belong_is_refused(tmp_path: Path) -> None:
    TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2)).save(tmp_path)
    stored = load_file(tmp_path / "sae.safetensors")
    save_file(stored | {"W_enc": stored["W_enc"].T.contiguous()}, tmp_path / "sae.safetensors")
    refused(tmp_path, r"W_enc is \[10, 6\], needs \[6, 10\]")
