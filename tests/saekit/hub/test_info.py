"""What is said of a dictionary without its weights: the same as loading it gives, from headers only, nothing run."""

import collections
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from saekit.errors import FormatError
from saekit.hub import load_sae, plan_push
from saekit.hub.discover import dictionaries
from saekit.hub.info import dictionary_info
from saekit.hub.pickle_outline import state_outline
from saekit.hub.place import locate
from saekit.sae import (
    MLSAEConfig,
    MultiLayerDictionary,
    SitesConfig,
    TopKConfig,
    TopKCrosscoderConfig,
    TopKSAE,
    TranscoderConfig,
)
from saekit.sae.checkpoint import build_sae
from tests.saekit.hub.conftest import FIXTURES, Changed
from tests.saekit.hub.hub_server import HubServer

REFS = [
    locate(folder, None).name_of(name)
    for folder in sorted(FIXTURES.iterdir())
    if folder.is_dir()
    for name in dictionaries(locate(folder, None).names)
]


@pytest.mark.parametrize("ref", REFS, ids=lambda ref: str(Path(ref).relative_to(FIXTURES)))
def test_info_says_what_loading_gives(ref: str) -> None:
    info = dictionary_info(ref)
    sae = load_sae(ref)
    assert info.format == sae.source["format"]
    assert info.num_bytes == sum(path.stat().st_size for path in _weights(ref))
    assert (info.d_in, info.d_sae, info.units) == (sae.d_in, sae.d_sae, sae.source["units"])
    if isinstance(sae, MultiLayerDictionary):
        sites = sae.cfg.sites
        assert info.hook_point == (None if sites is None else [str(site) for site in sites])
        assert info.num_layers == sae.cfg.num_layers_in
    else:
        assert info.hook_point == sae.hook_point
    config = sae.cfg.to_dict()
    assert info.normalisation == config.get("norm")
    assert info.architecture == config.get("activation", {"kind": config["kind"], "k": config.get("k")})


def _weights(ref: str) -> list[Path]:
    place = locate(ref, None)
    return [place.folder / name for files in dictionaries(place.names).values() for name in files]


def test_config_that_only_numbers_can_judge_leaves_the_rest_known(changed: Changed) -> None:
    info = dictionary_info(changed("saelens_v5_scaling_factor", {"finetuning_scaling_factor": False}))
    assert (info.format, info.kind, info.d_sae) == ("saelens", None, None)
    assert info.model == "gpt2-small"
    assert info.tensors["W_enc"][1] == (32, 128)


def test_tensors_are_listed_as_the_file_has_them() -> None:
    info = dictionary_info(FIXTURES / "gemmascope_res")
    assert info.tensors["W_enc"] == ("float32", (32, 128))
    assert (info.kind, info.architecture) == ("sae", {"kind": "jumprelu", "negative": "zero"})


def _large(suffix: str) -> bytes:
    """Returns a file of a megabyte that holds an SAE: 64 wide, 2048 features."""
    shapes = {"W_enc": (64, 2048), "b_enc": (2048,), "W_dec": (2048, 64), "b_dec": (64,), "threshold": (2048,)}
    if suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
        return buffer.getvalue()
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    if suffix == ".safetensors":
        return safetensors.torch.save({name.lower(): tensor for name, tensor in tensors.items()})
    state = {
        "encoder.weight": tensors["W_dec"],
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_enc"],
        "b_dec": tensors["b_dec"],
        "k": torch.tensor(7, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "config", "format"),
    [
        ("params.npz", {}, "gemma_scope"),
        ("params.safetensors", {"config.json": b"{}"}, "gemma_scope_2"),
        ("ae.pt", {"config.json": b'{"trainer": {"dict_class": "AutoEncoderTopK"}}'}, "dictionary_learning"),
    ],
)
def test_of_a_file_on_the_hub_only_the_header_is_read(
    hub: HubServer, name: str, config: dict[str, bytes], format: str
) -> None:
    content = _large(Path(name).suffix)
    hub.add("some/one", {name: content, **config}, card={"license": "mit"})
    info = dictionary_info("some/one")
    assert (info.format, info.d_in, info.d_sae, info.licence) == (format, 64, 2048, "mit")
    assert info.num_bytes == len(content) > 1_000_000
    (size, sha256) = info.files[name]
    assert size == len(content)
    assert sha256 is not None
    asked = [request.range for request in hub.requests if request.path.startswith("/storage/")]
    spans = [tuple(int(end) for end in span.removeprefix("bytes=").split("-")) for span in asked if span]
    assert len(spans) == len(asked) <= 24
    assert sum(last - first + 1 for first, last in spans) < 150_000
    if format == "dictionary_learning":
        assert info.architecture == {"kind": "topk", "k": 7, "by": "value", "negative": "zero"}


def test_file_in_the_cache_is_not_asked_for_again(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = "google/gemma-scope-2b-pt-res"
    hub.add(repo, FIXTURES / "gemmascope_res")
    ref = f"{repo}:layer_20/width_16k/average_l0_71"
    with pytest.raises(FormatError, match="not in the hub's cache"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        dictionary_info(ref)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = dictionary_info(ref)
    assert before.hook_point == "model.layers.20"
    load_sae(ref)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert dictionary_info(ref).tensors == before.tensors
    assert hub.requests == []


def test_weights_that_were_never_downloaded_are_named_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("some/one", {"params.npz": _large(".npz")})
    dictionary_info("some/one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match=r"params.npz is not in the hub's cache, and the hub cannot be asked"):
        dictionary_info("some/one")


def test_storm_of_errors_is_sat_out_by_the_header_too(hub: HubServer, waits: list[float]) -> None:
    hub.add("some/one", {"params.npz": _large(".npz")})
    hub.fail("/storage/", 503, times=2)
    hub.cut("/storage/", after=10)
    assert dictionary_info("some/one").d_sae == 2048
    assert waits == [1.0, 2.0, 4.0]
    hub.fail("/storage/", 500, times=100)
    with pytest.raises(FormatError, match=r"params.npz cannot be read: .*500.*, needs a connection; try again"):
        dictionary_info("some/one")


def test_server_without_ranges_is_read_as_far_as_needed(hub: HubServer) -> None:
    hub.has_ranges = False
    hub.add("some/one", {"params.safetensors": _large(".safetensors"), "config.json": b"{}"})
    assert dictionary_info("some/one").d_sae == 2048


def test_gated_repository_says_so_before_any_header(hub: HubServer) -> None:
    hub.add("some/one", {"params.npz": _large(".npz")}, is_gated=True)
    with pytest.raises(FormatError, match="gated"):
        dictionary_info("some/one")


@pytest.mark.parametrize(
    ("cfg", "kind", "k"),
    [
        (TopKConfig(d_in=6, d_sae=10, k=2), "sae", 2),
        (TranscoderConfig(d_in=6, d_sae=10, d_out=4, k=3), "transcoder", 3),
    ],
)
def test_own_folder_is_described(tmp_path: Path, cfg: TopKConfig, kind: str, k: int) -> None:
    build_sae(cfg, hook_point="model.layers.3", source={"model": "some/model"}).save(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\nA dictionary.\n")
    info = dictionary_info(tmp_path)
    assert (info.format, info.kind, info.d_in, info.d_sae) == ("saekit", kind, 6, 10)
    assert (info.hook_point, info.model, info.licence) == ("model.layers.3", "some/model", "apache-2.0")
    assert info.architecture == {"kind": cfg.kind, "k": k}


@pytest.mark.parametrize(
    "cfg",
    [TopKCrosscoderConfig(d_in=6, d_sae=10, k=2, num_sites=3), MLSAEConfig(d_in=6, d_sae=10, k=2, num_sites=3)],
    ids=lambda cfg: cfg.kind,
)
def test_own_folder_of_several_places_is_described(tmp_path: Path, cfg: SitesConfig) -> None:
    points = ["model.layers.1", "model.layers.2", "model.layers.4"]
    build_sae(cfg, hook_point=",".join(points)).save(tmp_path)
    info = dictionary_info(tmp_path)
    assert (info.kind, info.num_layers, info.hook_point) == ("multilayer", 3, points)
    card = plan_push(tmp_path, "me/mine").card
    assert "of 10 features that reads 3 places" in card
    assert "# x: [..., 3, 6]" in card
    assert "For other libraries" not in card, "none of them can have it"


def test_low_rank_sparse_attention_is_no_transcoder(tmp_path: Path) -> None:
    assert dictionary_info(FIXTURES / "llamascopium_lorsa_topk").kind == "lorsa"
    load_sae(FIXTURES / "llamascopium_lorsa_topk").save(tmp_path)
    card = plan_push(tmp_path, "me/mine").card
    assert "# x: [B, T, 12]" in card
    assert "For other libraries" not in card


def test_card_of_a_transcoder_says_it_once(tmp_path: Path) -> None:
    cfg = TranscoderConfig(d_in=6, d_sae=10, d_out=4, k=3)
    build_sae(cfg, hook_point="model.layers.3").save(tmp_path)
    card = plan_push(tmp_path, "me/mine").card
    assert "A transcoder of 10 features" in card
    assert card.count("- transcoder") == 1


@pytest.mark.parametrize("fixture", ["gemmascope2_clt_affine", "saelens_v5_gated", "temporal_hub"])
def test_released_dictionary_that_saekit_saved_is_described_as_before(tmp_path: Path, fixture: str) -> None:
    load_sae(FIXTURES / fixture).save(tmp_path)
    before, after = dictionary_info(FIXTURES / fixture), dictionary_info(tmp_path)
    assert after.format == "saekit"
    for name in (
        "kind",
        "architecture",
        "d_in",
        "d_sae",
        "d_out",
        "num_layers",
        "hook_point",
        "normalisation",
        "units",
    ):
        assert getattr(after, name) == getattr(before, name), name


def test_several_dictionaries_are_named(tmp_path: Path) -> None:
    for name in ("first", "second"):
        TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2)).save(tmp_path / name)
    with pytest.raises(FormatError, match="holds 2 SAE folders, needs one"):
        dictionary_info(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('/tmp/saekit_was_here', 'w')",)


def test_pickle_that_would_run_code_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"W_enc": torch.ones(3), "evil": _Evil()}, tmp_path / "sae.pt")
    with pytest.raises(FormatError, match=r"pickled builtins\.eval, needs tensors, numbers and texts only"):
        dictionary_info(tmp_path / "sae.pt")
    assert not Path("/tmp/saekit_was_here").exists()


@pytest.mark.parametrize("keep", [0, 1, 3, 100, 600, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_cut_file_is_one_line(tmp_path: Path, suffix: str, keep: float) -> None:
    content = _large(suffix)
    path = tmp_path / f"params{suffix}"
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(FormatError) as caught:
        dictionary_info(path)
    assert "\n" not in str(caught.value)


def test_old_file_of_torch_save_is_outlined_from_its_start() -> None:
    buffer = io.BytesIO()
    torch.save({"W_enc": torch.ones(64, 2048)}, buffer, _use_new_zipfile_serialization=False)
    content = state_outline(io.BytesIO(buffer.getvalue()[:2000]), "here")
    assert isinstance(content, dict)
    assert (content["W_enc"].shape, content["W_enc"].is_meta) == ((64, 2048), True)


def test_pickle_of_a_foreign_reference_is_refused() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("file", "/etc/passwd") if isinstance(value, collections.Counter) else None

    data, buffer = io.BytesIO(), io.BytesIO()
    Pickler(data, protocol=2).dump({"a": collections.Counter()})
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", data.getvalue())
    with pytest.raises(FormatError, match=r"a reference .+passwd.+, needs the storage of a tensor"):
        state_outline(buffer, "here")
    with pytest.raises(FormatError, match=r"needs an unbroken file of torch\.save"):
        state_outline(io.BytesIO(b"PK\x03\x04"), "here")


def test_info_is_json(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gemmascope2_clt_affine", tmp_path / "clt")
    assert json.loads(json.dumps(dictionary_info(tmp_path / "clt").to_dict()))["kind"] == "multilayer"
