"""Runs in a peer's own environment: loads what saekit wrote with the peer's code, computes, and writes it again the peer's way.

    python worker.py PEER < jobs.json

Jobs are `[folder, inputs, results]`: a dictionary's folder, an .npy of inputs, and a folder for `acts.npy`, `recon.npy` and
`again/`, the same dictionary as the peer writes it. Needs torch, numpy and the peer; nothing of saekit.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Done = tuple[Tensor, Tensor]


def saelens(folder: Path, x: Tensor, again: Path) -> Done:
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder), device="cpu")
    sae.save_model(again)
    return sae.encode(x), sae(x)


def sparsify(folder: Path, x: Tensor, again: Path) -> Done:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder, device="cpu")
    sae.save_to_disk(again)
    # Its forward compares with a target of the output's shape; the reconstruction does not depend on it.
    out = sae(x, torch.zeros(len(x), sae.W_dec.shape[1]))
    acts = torch.zeros(len(x), sae.num_latents).scatter(1, out.latent_indices.long(), out.latent_acts)
    return acts, out.sae_out


def dictionary_learning(folder: Path, x: Tensor, again: Path) -> Done:
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder), "cpu")
    # As its trainers write it.
    again.mkdir(parents=True)
    torch.save(sae.state_dict(), again / "ae.pt")
    shutil.copy(folder / "config.json", again)
    acts = sae.encode(x)
    return acts, sae.decode(acts)


def circuit_tracer(folder: Path, x: Tensor, again: Path) -> Done:
    import yaml
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    config = yaml.safe_load((folder / "config.yaml").read_text())
    options: dict[str, Any] = {
        "scan": config["scan"],
        "feature_input_hook": config["feature_input_hook"],
        "feature_output_hook": config["feature_output_hook"],
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "lazy_encoder": False,
        "lazy_decoder": False,
    }
    by_layer = x.transpose(0, 1)  # [L, N, d_in]
    if config["model_kind"] == "transcoder_set":
        paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(len(by_layer))}
        sae = load_transcoder_set(paths, **options)
        acts = sae.encode(by_layer)
        recon = sae.decode(acts, by_layer)
    else:
        sae = load_clt(str(folder), **options)
        acts, recon = sae.encode(by_layer), sae(by_layer)
    sae.to_safetensors(str(again))
    shutil.copy(folder / "config.yaml", again)
    return acts.transpose(0, 1), recon.transpose(0, 1)


PEERS = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "circuit-tracer": circuit_tracer,
}


def main() -> None:
    """Does every job of standard input."""
    peer = PEERS[sys.argv[1]]
    for folder, inputs, results in json.load(sys.stdin):
        x, out = torch.from_numpy(np.load(inputs)), Path(results)
        out.mkdir(parents=True)
        with torch.no_grad():
            acts, recon = peer(Path(folder), x, out / "again")
        np.save(out / "acts.npy", acts.detach().numpy())
        np.save(out / "recon.npy", recon.detach().numpy())


if __name__ == "__main__":
    main()
