"""Every fixture, written by the peers' own code, gives the activations and reconstructions that they computed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.hub import load_sae, load_saes
from saekit.hub.discover import config_names, dictionaries
from saekit.hub.formats.dictionary_learning import read_dictionary_learning
from saekit.hub.place import locate
from saekit.hub.release import Release, Weights, read_mapping
from saekit.hub.table import FORMATS, recognise
from saekit.sae.activation import BatchTopK, JumpReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.dictionary import Dictionary
from saekit.sae.multilayer import MultiLayerDictionary

FIXTURES = Path(__file__).parents[2] / "fixtures" / "dictionaries"
NAMES = [entry["name"] for entry in json.loads((FIXTURES / "MANIFEST.json").read_text(encoding="utf-8"))]
TOLERANCE = 2e-4

Computed = dict[str, Tensor]


def array(name: str, file: str) -> Tensor:
    return torch.from_numpy(np.load(FIXTURES / name / f"{file}.npy", allow_pickle=False))


def one_site(name: str) -> Computed:
    """A dictionary of one site: what it encodes, and its whole forward."""
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    return {"acts": sae.encode(x), "recon": sae(x).x_hat}


def decode_alone(name: str) -> Computed:
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    return one_site(name) | {"recon_decode_only": sae.decode(sae.encode(x))}


def heads(name: str) -> Computed:
    """Heads are concatenated at the site; the peers kept them apart."""
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    flat = x.flatten(1)
    return {"acts": sae.encode(flat), "recon": sae(flat).x_hat.view_as(x)}


def set_of_layers(name: str) -> Computed:
    """One dictionary a layer; the peer stacked the layers first."""
    saes, x = load_saes(FIXTURES / name), array(name, "inputs")
    assert list(saes) == [f"layer_{layer}.safetensors" for layer in range(len(x))]
    ordered = list(saes.values())
    return {
        "acts": torch.stack([sae.encode(row) for sae, row in zip(ordered, x, strict=True)]),
        "recon": torch.stack([sae(row).x_hat for sae, row in zip(ordered, x, strict=True)]),
    }


def layers_first(name: str) -> Computed:
    """The layer is the first axis of the peer's arrays, the last but one of ours."""
    sae, x = load_sae(FIXTURES / name), array(name, "inputs").transpose(0, 1)
    return {"acts": sae.encode(x).transpose(0, 1), "recon": sae(x).x_hat.transpose(0, 1)}


def one_layer_of_several(name: str) -> Computed:
    """The peer cuts layer 1 out of a cross-layer transcoder and adds up all that it writes, wherever it belongs."""
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    assert isinstance(sae, MultiLayerDictionary)
    layers = torch.zeros(len(x), 3, x.shape[1])
    layers[:, 1] = x
    acts = sae.encode(layers)[:, 1]
    return {"acts": acts, "recon": acts @ sae.decoders[1].sum(dim=1) + sae.b_dec[1]}


def auto_encoder(name: str) -> Computed:
    """The file taken literally, beside what its own loader makes of it."""
    folder, x = FIXTURES / name / "run/resid_post_layer_5/trainer_0", array(name, "inputs")
    configs = {"config.json": read_mapping(folder / "config.json")}
    raw = read_dictionary_learning(
        Release(folder=folder, files=("ae.pt",), configs=configs, ref=name), unit_decoder=False
    )
    return one_site(name) | {"acts_raw": raw.encode(x), "recon_raw": raw(x).x_hat}


def top_k_by_threshold(name: str) -> Computed:
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    assert isinstance(sae, Dictionary)
    file = FIXTURES / name / "run/resid_post_layer_5/trainer_0/ae.pt"
    threshold = torch.load(file, weights_only=True)["threshold"]
    by_threshold = sae.with_activation(JumpReLU(), threshold.reshape(1))
    return one_site(name) | {"acts_threshold": by_threshold.encode(x)}


def batch_top_k(name: str) -> Computed:
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    assert isinstance(sae, Dictionary)
    return one_site(name) | {"acts_batchtopk": sae.with_activation(BatchTopK(k=8)).encode(x)}


def four_k(name: str) -> Computed:
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    assert isinstance(sae, Dictionary)
    return one_site(name) | {"recon_forward_4k": sae.with_activation(TopK(k=32))(x).x_hat}


def qwen(name: str) -> Computed:
    """The release is what its model card says; the peer that computed `acts` adds a relu."""
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    assert isinstance(sae, Dictionary)
    peer = sae.with_activation(TopK(k=8))
    computed = {"acts_card": sae.encode(x), "acts": peer.encode(x), "recon": peer(x).x_hat}
    return computed | {"recon_card": sae(x).x_hat}


def embedding(name: str) -> Computed:
    """The peer forgets to scale b_dec by sqrt(d)."""
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    return {"acts": sae.encode(x), "recon": sae(x).x_hat - sae.b_dec + sae.b_dec / x.shape[-1] ** 0.5}


def code_normalised(name: str) -> Computed:
    sae, x = load_sae(FIXTURES / name), array(name, "inputs")
    assert isinstance(sae, MultiLayerDictionary)
    norms = sae.decoders[0].norm(dim=2).sum(dim=1)
    return one_site(name) | {"acts_normalised": sae.encode(x) * norms}


SPECIAL: Mapping[str, Callable[[str], Computed]] = {
    "circuittracer_clt_relu": layers_first,
    "circuittracer_plt_jumprelu": set_of_layers,
    "circuittracer_plt_relu": set_of_layers,
    "connor_attn": heads,
    "dictlearn_batch_topk": batch_top_k,
    "dictlearn_standard": auto_encoder,
    "dictlearn_standard_april_update": auto_encoder,
    "dictlearn_topk": top_k_by_threshold,
    "gemmascope_embedding": embedding,
    "mntss_clt_as_per_layer": one_layer_of_several,
    "qwen_scope": qwen,
    "qwen_scope_few_positive": qwen,
    "saelens_v6_jumprelu_skip_transcoder": decode_alone,
    "saelens_v6_jumprelu_transcoder": decode_alone,
    "saelens_v6_standard_hook_z": heads,
    "saelens_v6_temporal": decode_alone,
    "saelens_v6_transcoder": decode_alone,
    "sof_crosscoder": code_normalised,
    "sparsify_multi_topk": four_k,
}
# Where the peer computes another function than the release, its numbers are kept out: name -> files and why.
LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    "llamascope_r1_distill": {"acts_folded": "raw units", "recon_folded": "raw units"},
    "llamascopium_sae_jumprelu": {"acts_folded": "inexact fold", "recon_folded": "inexact fold"},
    "llamascopium_sae_topk": {"acts_folded": "raw units", "recon_folded": "raw units"},
    "llamascopium_transcoder_topk": {"acts_folded": "raw units", "recon_folded": "raw units"},
    "saelens_v6_standard_bf16": {"acts": "bfloat16 arithmetic", "recon": "bfloat16 arithmetic"},
}


@pytest.mark.parametrize("name", NAMES)
def test_fixture_gives_the_peers_numbers(name: str) -> None:
    computed = SPECIAL.get(name, one_site)(name)
    expected = {path.stem for path in (FIXTURES / name).glob("*.npy")} - {"inputs"} - LEFT_OUT.get(name, {}).keys()
    assert expected <= computed.keys()
    for file in sorted(expected):
        assert computed[file].shape == array(name, file).shape, file
        assert (computed[file] - array(name, file)).abs().max() <= TOLERANCE, file


def test_every_fixture_is_in_the_table() -> None:
    on_disk = {path.name for path in FIXTURES.iterdir() if path.is_dir()}
    assert on_disk == set(NAMES)
    assert SPECIAL.keys() | LEFT_OUT.keys() <= on_disk


@pytest.mark.parametrize("name", NAMES)
def test_sparse_code_is_the_dense_one(name: str) -> None:
    for sae, x in _with_inputs(name):
        values, indices = sae.encode_sparse(x)
        dense = sae.encode(x).reshape(len(values), -1)
        assert (torch.zeros_like(dense).scatter_add(1, indices, values) - dense).abs().max() <= 1e-5


def _with_inputs(name: str) -> list[tuple[SAE, Tensor]]:
    x = array(name, "inputs")
    if SPECIAL.get(name) is set_of_layers:
        return list(zip(load_saes(FIXTURES / name).values(), x, strict=True))
    sae = load_sae(FIXTURES / name)
    if isinstance(sae, MultiLayerDictionary) and SPECIAL.get(name) is layers_first:
        return [(sae, x.transpose(0, 1))]
    if SPECIAL.get(name) is one_layer_of_several:
        return [(sae, x[:, None].repeat(1, 3, 1))]
    return [(sae, x.flatten(1) if SPECIAL.get(name) is heads else x)]


FORMATS_OF = {
    "apollo": "apollo",
    "bytedance": "cross_layer",
    "circuittracer_clt": "cross_layer",
    "circuittracer_plt": "transcoder_set",
    "ckkissane": "model_diff_crosscoder",
    "connor": "connor",
    "deepseek": "deepseek",
    "dictlearn": "dictionary_learning",
    "dunefsky": "dunefsky",
    "gemmascope2_clt": "gemma_scope_2_layers",
    "gemmascope2_crosscoder": "gemma_scope_2_layers",
    "gemmascope2_": "gemma_scope_2",
    "gemmascope_": "gemma_scope",
    "goodfire": "goodfire",
    "llamascope_r1": "llama_scope_r1",
    "llamascope_": "llama_scope",
    "llamascopium_clt": "llamascopium_layers",
    "llamascopium_crosscoder": "llamascopium_layers",
    "llamascopium_lorsa": "lorsa",
    "llamascopium_": "llamascopium",
    "mntss": "cross_layer",
    "mwhanna": "transcoder_set",
    "openai": "openai",
    "qwen": "qwen_scope",
    "saelens_v6_temporal": "saelens_temporal",
    "saelens": "saelens",
    "sof": "finetuning_crosscoder",
    "sparsify": "sparsify",
    "temporal_hub": "temporal",
}


@pytest.mark.parametrize("name", NAMES)
def test_format_is_recognised_without_reading_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Weights, "take", read)
    monkeypatch.setattr(Weights, "scalar", read)
    place = locate(FIXTURES / name, None)
    for dictionary, files in dictionaries(place.names).items():
        configs = {Path(c).name: read_mapping(FIXTURES / name / c) for c in config_names(place.names, files)}
        release = Release(folder=FIXTURES / name, files=files, configs=configs, ref=place.name_of(dictionary))
        expected = next(format for prefix, format in FORMATS_OF.items() if name.startswith(prefix))
        assert recognise(release) == expected


def test_every_format_has_a_fixture() -> None:
    assert set(FORMATS_OF.values()) == set(FORMATS)
