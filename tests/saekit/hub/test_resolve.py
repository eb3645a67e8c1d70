"""From a reference to an SAE, and what references that name nothing say."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from saekit.errors import ConfigError, FormatError
from saekit.hub import load_sae, load_saes
from saekit.manifest import begin_stage, file_sha256
from saekit.sae import Dictionary, TopKConfig, TopKSAE
from saekit.sae.places import sites_in

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"


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


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub; returns the folder of its cache, empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("ref", ["google/gemma-scope-2b-pt-res:layer_20/width_16k", "runs/none"])
def test_reference_that_is_no_folder_and_not_cached_says_so(ref: str) -> None:
    with pytest.raises(FormatError, match=r"no such folder here, not in the hub's cache, and the hub cannot be asked"):
        load_sae(ref)


@pytest.mark.parametrize("ref", ["/nowhere/at/all", "a/../b", "one"])
def test_reference_that_can_be_no_repository_says_what_is_read(ref: str) -> None:
    with pytest.raises(FormatError, match="no such folder, needs the output folder of a training run, a release"):
        load_sae(ref)


def test_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no cfg.json and no weights of a dictionary, needs the output folder"):
        load_sae(tmp_path)


def cached(cache: Path, fixture: str, repo: str) -> None:
    """Puts a fixture's files where the hub's client keeps a repository."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("c0ffee", encoding="utf-8")
    shutil.copytree(FIXTURES / fixture, home / "snapshots" / "c0ffee")


def test_hub_reference_is_read_from_the_cache_when_offline(offline: Path) -> None:
    cached(offline, "gemmascope_res", "google/gemma-scope-2b-pt-res")
    sae = load_sae("google/gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71")
    local = load_sae(FIXTURES / "gemmascope_res")
    assert torch.equal(sae.W_dec, local.W_dec)
    assert sae.hook_point == "model.layers.20"
    assert (sae.source["repo"], sae.source["revision"]) == ("google/gemma-scope-2b-pt-res", "c0ffee")
    assert local.hook_point is None


def test_hub_file_is_read_with_the_configs_beside_it(offline: Path) -> None:
    cached(offline, "qwen_scope", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")
    sae = load_sae("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50:layer0.sae.pt")
    assert sae.hook_point == "model.layers.0"
    assert set(sae.source["files"]) >= {"layer0.sae.pt", "config.json"}


def test_hub_path_that_is_not_there_names_what_is(offline: Path) -> None:
    cached(offline, "qwen_scope", "Qwen/x")
    with pytest.raises(FormatError, match=r"'Qwen/x' has no 'layer9', needs one of 'layer0.sae.pt'"):
        load_sae("Qwen/x:layer9")


def test_load_saes_without_a_match_names_what_there_is() -> None:
    with pytest.raises(FormatError, match=r"none is named like 'layer_9\*', needs one of '.*layer_0.safetensors'"):
        load_saes(FIXTURES / "circuittracer_plt_relu", pattern="layer_9*")


def test_weights_file_alone_is_read() -> None:
    sae = load_sae(FIXTURES / "circuittracer_plt_relu" / "layer_1.safetensors")
    assert sae.hook_point == "model.layers.1.mlp:input"


def test_dtype_and_hook_point_can_be_chosen() -> None:
    sae = load_sae(FIXTURES / "goodfire_llama31_8b", dtype=torch.bfloat16, hook_point="model.layers.3:input")
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.hook_point == "model.layers.3:input"
    assert isinstance(sae, Dictionary)
    assert str(sae.cfg.site) == "model.layers.3:input"
    with pytest.raises(
        ConfigError, match=r"'model\.layers\.3:inside': needs a module path, ':input' or ':output' behind it"
    ):
        load_sae(FIXTURES / "goodfire_llama31_8b", hook_point="model.layers.3:inside")


def test_hook_points_of_several_layers_can_be_chosen_all_together() -> None:
    points = "model.layers.0,model.layers.4:input,model.layers.5"
    sae = load_sae(FIXTURES / "llamascopium_crosscoder_jumprelu", hook_point=points)
    assert sae.hook_point == points
    assert ",".join(map(str, sites_in(sae))) == points
    with pytest.raises(ConfigError, match=r"'model\.layers\.0' names 1 places, needs the 3"):
        load_sae(FIXTURES / "llamascopium_crosscoder_jumprelu", hook_point="model.layers.0")


def test_device_that_is_not_there_is_refused_before_anything_is_read() -> None:
    for load in (load_sae, load_saes):
        with pytest.raises(ConfigError, match=r"^sae: device 'cuda:99' cannot be used: [^\n]+$"):
            load("nowhere", device="cuda:99")


def test_revision_of_a_local_folder_is_refused() -> None:
    with pytest.raises(FormatError, match="revision 'v2' of a local folder, needs none"):
        load_sae(FIXTURES / "saelens_v6_topk", revision="v2")
    file = FIXTURES / "circuittracer_plt_relu" / "layer_1.safetensors"
    with pytest.raises(FormatError, match="revision 'v2' of a local file, needs none"):
        load_sae(file, revision="v2")


def test_own_format_can_be_asked_for(tmp_path: Path) -> None:
    TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2)).save(tmp_path)
    assert isinstance(load_sae(tmp_path, format="saekit"), TopKSAE)
    with pytest.raises(FormatError, match="format 'saekit', needs one of"):
        load_sae(FIXTURES / "saelens_v6_topk", format="saekit")


@pytest.mark.parametrize(
    "fixture", ["saelens_v5_gated", "gemmascope2_clt_affine", "temporal_hub", "llamascopium_sae_topk"]
)
def test_release_saved_by_saekit_is_loaded_again_with_its_record(fixture: str, tmp_path: Path) -> None:
    sae = load_sae(FIXTURES / fixture)
    sae.save(tmp_path)
    again = load_sae(tmp_path)
    assert type(again) is type(sae)
    assert again.cfg == sae.cfg
    assert again.hook_point == sae.hook_point
    assert again.source == sae.source
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in sae.state_dict().items()
    }


def test_source_keeps_the_peers_config_as_it_stands() -> None:
    folder = FIXTURES / "sparsify_topk"
    source = load_sae(folder).source
    assert source["format"] == "sparsify"
    assert source["metadata"] == {"cfg.json": json.loads((folder / "layers.5" / "cfg.json").read_text())}
    assert source["files"]["layers.5/sae.safetensors"] == file_sha256(folder / "layers.5" / "sae.safetensors")


def test_sha256_is_enforced() -> None:
    file = FIXTURES / "goodfire_llama31_8b" / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    digest = file_sha256(file)
    assert load_sae(file, sha256=digest).d_sae == 128
    assert load_sae(file, sha256={file.name: digest}).d_sae == 128
    with pytest.raises(FormatError, match=f"has sha256 {digest}, needs {'0' * 64}; it is not the file you mean"):
        load_sae(file, sha256="0" * 64)
    with pytest.raises(FormatError, match=r"3 weights files and one sha256|6 weights files and one sha256"):
        load_sae(FIXTURES / "circuittracer_clt_relu", sha256=digest)


def test_sha256_of_an_own_folder_is_enforced(tmp_path: Path) -> None:
    TopKSAE(TopKConfig(d_in=6, d_sae=10, k=2)).save(tmp_path)
    load_sae(tmp_path, sha256=file_sha256(tmp_path / "sae.safetensors"))
    with pytest.raises(FormatError, match="it is not the file you mean"):
        load_sae(tmp_path, sha256="0" * 64)


def test_unknown_forced_format_names_the_known_ones() -> None:
    with pytest.raises(FormatError, match=r"format 'saelenz', needs one of gemma_scope, .*saelens, "):
        load_sae(FIXTURES / "saelens_v6_topk", format="saelenz")


def test_forced_format_that_does_not_fit_says_what_it_needs() -> None:
    with pytest.raises(FormatError, match=r"has \['cfg.json'\], needs hyperparams.json"):
        load_sae(FIXTURES / "saelens_v6_topk", format="llama_scope")
