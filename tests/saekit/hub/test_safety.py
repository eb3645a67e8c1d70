"""Files that are broken, lie, or want to run code: one clear line, and nothing is loaded."""

import json
import os
import pickle
import random
import shutil
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

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
Changed = Callable[..., Path]


class _Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_malicious_pickle_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "ae.pt", tmp_path / "trace"
    torch.save({"encoder.weight": torch.ones(2), "x": _Runs(trace)}, file)
    with pytest.raises(FormatError, match=r"ae\.pt': pickled (posix|nt)\.mkdir, needs tensors, numbers and texts only"):
        load_sae(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("protocol", "message"), [(2, r"ae\.pt': .*needs "), (4, "neither an archive nor an old file")]
)
def test_malicious_raw_pickle_is_refused_and_not_run(protocol: int, message: str, tmp_path: Path) -> None:
    file, trace = tmp_path / "ae.pt", tmp_path / "trace"
    file.write_bytes(pickle.dumps(_Runs(trace), protocol=protocol))
    with pytest.raises(FormatError, match=message):
        load_sae(file)
    assert not trace.exists()


def test_pickled_class_that_is_no_known_config_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"cfg": Path("x"), "state_dict": {}}, tmp_path / "sae.pt")
    with pytest.raises(FormatError, match=r"pickled pathlib\.\w+, needs tensors, numbers and texts only"):
        load_sae(tmp_path / "sae.pt")


def test_malicious_array_of_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    arrays: dict[str, Any] = {"W_enc": np.array([_Runs(trace)], dtype=object)}
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(FormatError, match=r"'W_enc\.npy' holds object, needs numbers"):
        load_sae(tmp_path)
    assert not trace.exists()


def test_compressed_array_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "params.npz", W_enc=np.zeros((1000, 1000), dtype=np.float32))
    with pytest.raises(FormatError, match=r"'W_enc\.npy' grows from \d+ to 4000128 bytes, needs real weights"):
        load_sae(tmp_path)


def test_compressed_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"encoder_linear.weight": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(FormatError, match=r"data\.pkl' is compressed, needs a file as torch\.save writes it"):
        load_sae(tmp_path / "a.pt")


def test_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"encoder_linear.weight": torch.ones(1).expand(100_000, 100_000)}, tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"\[100000, 100000\] needs 40000000000 bytes, the file holds 4"):
        load_sae(tmp_path / "a.pt")


def test_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "sae.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(FormatError, match=r"bytes, the header needs 4000000000\d+; download it again"):
        load_sae(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 50, 2000, -1])
def test_truncated_safetensors_is_refused(kept: int, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "saelens_v6_standard", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors': \d+ bytes, .*needs .*download it again"):
        load_sae(tmp_path)


@pytest.mark.parametrize("fixture", ["gemmascope_res", "goodfire_llama31_8b", "qwen_scope"])
def test_truncated_archive_is_refused(fixture: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / fixture, tmp_path, dirs_exist_ok=True)
    (file,) = [path for path in tmp_path.rglob("*") if path.suffix in {".npz", ".pt", ".pth"}]
    file.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(FormatError, match=f"{file.name}'.*needs an unbroken"):
        load_sae(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["W_enc", "threshold", "b_dec"])
def test_weights_that_are_not_finite_are_refused(tensor: str, value: float, changed: Changed) -> None:
    stored = load_file(FIXTURES / "saelens_v6_jumprelu" / "sae_weights.safetensors")[tensor]
    stored.view(-1)[3] = value
    folder = changed("saelens_v6_jumprelu", tensors={tensor: stored})
    with pytest.raises(FormatError, match=rf"sae_weights\.safetensors': {tensor} has NaN or Inf, needs finite weights"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("fixture", "config", "tensors", "message"),
    [
        ("saelens_v6_standard", {}, {"b_enc": torch.ones(127)}, r"b_enc is \[127\], needs \[128\]"),
        ("saelens_v6_standard", {}, {"W_enc": torch.ones(32)}, r"W_enc is \[32\], needs 2 axes"),
        ("saelens_v6_standard", {}, {"W_enc": torch.ones(32, 128).int()}, r"W_enc is I32, needs floating point"),
        ("saelens_v6_standard", {}, {"b_enc": None}, r"has W_dec, W_enc, b_dec, needs also b_enc"),
        (
            "saelens_v6_standard",
            {},
            {"extra": torch.ones(3)},
            r"also holds extra, needs only tensors that the format knows",
        ),
        ("saelens_v6_standard", {"d_sae": 129}, {}, r"config: d_sae is 129, the weights need 128"),
        ("saelens_v6_standard", {"architecture": "magic"}, {}, r"architecture 'magic', needs one of standard, gated"),
        (
            "saelens_v6_standard",
            {"normalize_activations": "whiten"},
            {},
            r"normalize_activations is 'whiten', needs one of",
        ),
        ("saelens_v6_standard", {"architecture": "skip_transcoder"}, {}, r"apply_b_dec_to_input is true, needs false"),
        ("saelens_v6_topk", {"k": 0}, {}, r"read as 'saelens': .*greater than or equal to 1"),
        ("saelens_v6_topk", {"k": 129}, {}, r"k is 129, needs at most d_sae = 128"),
        (
            "saelens_v6_standard",
            {"normalize_activations": ["none"]},
            {},
            r"normalize_activations is \[.none.\], needs one of none,",
        ),
        (
            "saelens_v6_standard",
            {},
            {"W_dec": torch.ones(128, 9), "b_dec": torch.ones(9)},
            r"bias of width 9 on an input of",
        ),
        ("saelens_v6_topk", {"k": "8"}, {}, r"config: k is '8', needs int"),
        ("saelens_v3_topk", {"activation_fn_str": "swish"}, {}, r"activation 'swish', needs relu, tanh-relu or topk"),
        ("sparsify_topk", {"activation": "swish"}, {}, r"activation is 'swish', needs 'topk' or 'groupmax'"),
        ("sparsify_topk", {"num_latents": 64}, {}, r"num_latents is 64, the weights need 128"),
        ("sparsify_topk", {}, {"W_dec": None}, r"has no W_dec, needs a decoder"),
        ("sparsify_topk", {"skip_connection": True}, {}, r"skip_connection is True, W_skip says otherwise"),
        ("dictlearn_topk", {}, {"k": torch.tensor(9, dtype=torch.int32)}, r"config: k is 8, the weights need 9"),
        (
            "dictlearn_topk",
            {"trainer": {"dict_class": "Magic"}},
            {},
            r"dict_class is 'Magic', needs one of AutoEncoder,",
        ),
        ("gemmascope2_resid", {"architecture": "topk"}, {}, r"architecture is 'topk', needs 'jump_relu'"),
        ("gemmascope2_resid", {"affine_connection": True}, {}, r"affine_connection is True, the weights say False"),
        ("gemmascope2_resid", {"type": "clt"}, {}, r"type is 'clt', these files need sae or transcoder"),
        ("gemmascope2_clt_affine", {"width": 145}, {}, r"width is 145, the weights need 144"),
        ("llamascope_res", {"act_fn": "relu"}, {}, r"act_fn is 'relu', needs 'jumprelu'"),
        (
            "llamascope_res",
            {"norm_activation": "token-wise"},
            {},
            r"norm_activation is 'token-wise', needs 'dataset-wise'",
        ),
        (
            "llamascopium_sae_topk",
            {"act_fn": "magic"},
            {},
            r"act_fn is 'magic', needs relu, jumprelu, topk or batchtopk",
        ),
        ("llamascopium_sae_topk", {"sae_type": "lorsa"}, {}, r"sae_type is 'lorsa', needs 'sae'"),
        (
            "llamascopium_crosscoder_jumprelu",
            {"act_fn": "batchlayertopk"},
            {},
            r"'batchlayertopk', needs relu, jumprelu, topk or batchtopk",
        ),
        ("qwen_scope", {"d_model": 33}, {}, r"config: d_model is 33, the weights need 32"),
        (
            "sof_crosscoder",
            {},
            {
                "activation_mean": torch.zeros(2, 24),
                "activation_std": torch.ones(2, 24),
                "activation_global_scale": None,
            },
            r"has activation_mean alone, needs activation_global_scale too",
        ),
        ("sof_crosscoder", {}, {"k": torch.tensor(5)}, r"has k and no threshold, needs one"),
        ("sof_crosscoder", {"encoder_layers": [0, 2]}, {}, r"reads layers \[0, 2\] of 2, the weights need 2"),
        ("sof_crosscoder", {"latent_processor": "x"}, {}, r"latent_processor is set, needs null"),
    ],
)
def test_files_that_disagree_are_refused(
    fixture: str, config: dict[str, Any], tensors: dict[str, Any], message: str, changed: Changed
) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        load_sae(changed(fixture, config=config, tensors=tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fixture", "suffix"),
    [
        ("saelens_v6_jumprelu", ".safetensors"),
        ("saelens_v6_jumprelu", ".json"),
        ("gemmascope_res", ".npz"),
        ("dictlearn_topk", ".pt"),
        ("saelens_v1_legacy_pt_pickle", ".pt"),
        ("temporal_hub", ".yaml"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_changed_bytes_are_one_line_or_another_dictionary(fixture: str, suffix: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / fixture, tmp_path, dirs_exist_ok=True)
    file = next(path for path in sorted(tmp_path.rglob(f"*{suffix}")) if path.name != "meta.json")
    content, draw = file.read_bytes(), random.Random(fixture)
    messages: list[str] = []
    for _ in range(40):
        broken = bytearray(content)
        for _ in range(draw.choice([1, 2, 8])):
            # Headers, pickles and directories lie at the ends.
            place = draw.choice([draw.randrange(len(content)), draw.randrange(300), -1 - draw.randrange(300)])
            broken[place % len(content)] = draw.randrange(256)
        file.write_bytes(bytes(broken))
        try:
            load_sae(tmp_path)
        except FormatError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert all(message.isprintable() for message in messages)


def test_layer_that_is_missing_is_named(changed: Changed) -> None:
    folder = changed("gemmascope2_clt_affine")
    next(folder.rglob("params_layer_1.safetensors")).unlink()
    with pytest.raises(FormatError, match=r"has layers \[0, 2\], needs 0 to 1 without gaps"):
        load_sae(folder)


def test_config_that_is_no_json_is_refused(changed: Changed) -> None:
    folder = changed("saelens_v6_standard")
    (folder / "cfg.json").write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=r"cfg\.json': cannot be read: .*, needs a config"):
        load_sae(folder)


def test_config_of_nested_aliases_is_refused(changed: Changed) -> None:
    folder = changed("circuittracer_plt_topk_main")
    lines = ["a: &a [x, x]", "b: &b [*a, *a]", "c: [*b, *b]"]
    (folder / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(FormatError, match=r"config\.yaml': cannot be read: holds an alias"):
        load_sae(folder)


def test_config_cannot_run_code(changed: Changed, tmp_path: Path) -> None:
    folder, trace = changed("circuittracer_plt_topk_main"), tmp_path / "trace"
    (folder / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{trace}']", encoding="utf-8")
    with pytest.raises(FormatError, match=r"config\.yaml': cannot be read: could not determine a constructor"):
        load_sae(folder)
    assert not trace.exists()


def test_tensors_that_no_format_has_are_listed(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"no known format has a\.weight \[3, 2\], needs one of gemma_scope, .*; say format="
    ):
        load_sae(tmp_path)


def test_changed_release_in_saekits_own_folder_is_refused(tmp_path: Path) -> None:
    load_sae(FIXTURES / "saelens_v6_gated").save(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    save_file({**tensors, "b_mag": tensors["b_mag"][:5]}, tmp_path / "sae.safetensors")
    with pytest.raises(FormatError, match=r"b_mag is \[5\], needs \[128\]"):
        load_sae(tmp_path)
