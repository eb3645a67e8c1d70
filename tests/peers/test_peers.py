"""What saekit writes, other libraries load, and compute saekit's numbers; what they write of it, saekit loads again."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.hub import convert_sae, load_saes, save_sae
from saekit.sae import (
    SAE,
    BatchTopKConfig,
    BatchTopKSAE,
    GatedConfig,
    GatedSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    MatryoshkaTopKConfig,
    MatryoshkaTopKSAE,
    MultiLayerDictionary,
    ReLUConfig,
    ReLUSAE,
    TopKConfig,
    TopKSAE,
)

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "dictionaries"
WORKER = Path(__file__).with_name("worker.py")
TOLERANCE = 2e-5
# Peer -> the environment that has it: circuit-tracer's dependencies contradict dictionary_learning's.
ENVIRONMENTS = {
    "saelens": "libraries",
    "sparsify": "libraries",
    "dictionary_learning": "libraries",
    "circuit-tracer": "circuit-tracer",
}
TRAINED: dict[str, Callable[[], SAE]] = {
    "ours_topk": lambda: TopKSAE(TopKConfig(d_in=32, d_sae=96, k=5)),
    "ours_batchtopk": lambda: BatchTopKSAE(BatchTopKConfig(d_in=32, d_sae=96, k=5)),
    "ours_jumprelu": lambda: JumpReLUSAE(JumpReLUConfig(d_in=32, d_sae=96)),
    "ours_relu": lambda: ReLUSAE(ReLUConfig(d_in=32, d_sae=96)),
    "ours_gated": lambda: GatedSAE(GatedConfig(d_in=32, d_sae=96)),
    "ours_matryoshka": lambda: MatryoshkaTopKSAE(MatryoshkaTopKConfig(d_in=32, d_sae=96, k=5)),
}
CASES = {
    "saelens": [
        *TRAINED,
        "saelens_v5_gated",
        "saelens_v6_abstopk",
        "saelens_v6_transcoder",
        "saelens_v6_jumprelu_transcoder",
        "saelens_v6_jumprelu_skip_transcoder",
        "saelens_v6_standard_layer_norm",
        "saelens_v6_standard_constant_norm_rescale",
        "sparsify_topk",
        "dictlearn_batch_topk",
        "goodfire_llama31_8b",
        "gemmascope2_transcoder",
        "llamascope_res",
        "openai_v5_topk",
    ],
    "sparsify": [
        "ours_topk",
        "ours_matryoshka",
        "sparsify_topk",
        "sparsify_groupmax",
        "sparsify_transcode",
        "sparsify_skip_transcode",
        "dictlearn_topk",
        "saelens_v5_topk",
    ],
    "dictionary_learning": [
        *TRAINED,
        "saelens_v5_gated",
        "sparsify_topk",
        "goodfire_llama31_8b",
        "llamascope_res",
        "dictlearn_batch_topk",
    ],
    "circuit-tracer": [
        "circuittracer_plt_relu",
        "circuittracer_plt_jumprelu",
        "circuittracer_clt_relu",
        "llamascopium_clt_jumprelu",
    ],
}
PAIRS = [(peer, case) for peer, cases in CASES.items() for case in cases]


def source(case: str) -> SAE:
    """An SAE of ours, all its numbers moved from where training starts."""
    sae = TRAINED[case]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sae


def write(case: str, peer: str, folder: Path) -> None:
    if case in TRAINED:
        save_sae(source(case), folder, format=peer)
    else:
        convert_sae(FIXTURES / case, folder, format=peer)


def loaded(folder: Path) -> list[SAE]:
    """One dictionary, or those of every layer."""
    return list(load_saes(folder).values())


def inputs(saes: list[SAE]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    first = saes[0]
    if isinstance(first, MultiLayerDictionary):
        return torch.randn(64, first.cfg.num_layers_in, first.d_in, generator=generator)
    return torch.randn(*([64] if len(saes) == 1 else [64, len(saes)]), first.d_in, generator=generator)


def computed(saes: list[SAE], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if len(saes) == 1:
            return saes[0].encode(x), saes[0](x).x_hat
        parts = [(sae.encode(x[:, i]), sae(x[:, i]).x_hat) for i, sae in enumerate(saes)]
    return torch.stack([acts for acts, _ in parts], dim=1), torch.stack([x_hat for _, x_hat in parts], dim=1)


@pytest.fixture(scope="session")
def peer_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function: peer, case -> the folder with `from` (what we wrote), `x.npy` and `out` (what the peer made of it)."""
    root = tmp_path_factory.mktemp("peers")
    failures: dict[str, str] = {}

    def run(peer: str) -> None:
        python = Path(os.environ.get("SAEKIT_PEERS", ROOT / ".venv-peers")) / ENVIRONMENTS[peer] / "bin" / "python"
        if not python.is_file():
            pytest.fail(f"no {python}; run scripts/test_peers, which makes it")
        jobs = []
        for case in CASES[peer]:
            folder = root / peer / case
            write(case, peer, folder / "from")
            np.save(folder / "x.npy", inputs(loaded(folder / "from")).numpy())
            jobs.append([str(folder / "from"), str(folder / "x.npy"), str(folder / "out")])
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
        environment.pop("PYTHONPATH", None)
        ran = subprocess.run(
            [str(python), str(WORKER), peer],
            input=json.dumps(jobs),
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
        )
        failures[peer] = "" if ran.returncode == 0 else ran.stderr[-2000:]

    def result(peer: str, case: str) -> Path:
        if peer not in failures:
            run(peer)
        folder = root / peer / case
        assert (folder / "out" / "recon.npy").is_file(), failures[peer]
        return folder

    return result


@pytest.mark.parametrize(("peer", "case"), PAIRS, ids=[f"{peer}-{case}" for peer, case in PAIRS])
def test_peer_computes_our_numbers(
    peer: str, case: str, peer_results: Callable[[str, str], Path], record_property: Callable[[str, object], None]
) -> None:
    folder = peer_results(peer, case)
    theirs = [torch.from_numpy(np.load(folder / "out" / f"{name}.npy")) for name in ("acts", "recon")]
    x = torch.from_numpy(np.load(folder / "x.npy"))
    # Against the dictionary that was exported, not against our reading of the export.
    saes = [source(case)] if case in TRAINED else loaded(FIXTURES / case)
    ours = computed(saes, x)
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    record_property("peer", peer)
    record_property("largest_difference", max(differences))
    assert ours[0].any()
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize(("peer", "case"), PAIRS, ids=[f"{peer}-{case}" for peer, case in PAIRS])
def test_what_the_peer_writes_is_read_as_it_computes_it(
    peer: str, case: str, peer_results: Callable[[str, str], Path]
) -> None:
    folder = peer_results(peer, case)
    x = torch.from_numpy(np.load(folder / "x.npy"))
    ours = computed(loaded(folder / "out" / "again"), x)
    for name, found in zip(("acts", "recon"), ours, strict=True):
        theirs = torch.from_numpy(np.load(folder / "out" / f"{name}.npy"))
        assert (found - theirs).abs().max() <= TOLERANCE, name
