"""SAEBench's own core evaluation, and the activations that its probing trains on, of our dictionaries as they are loaded."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saekit.sae import TopKConfig, TopKSAE

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "dictionaries"
CASES = (
    "ours",
    "saelens_v1_standard",
    "saelens_v6_standard_layer_norm",
    "saelens_v6_jumprelu",
    "saelens_v6_gated",
    "connor_attn",
    "apollo_e2e",
)


@pytest.fixture(scope="session")
def results(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[[str], Path], documents_file: Path
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("saebench")
    ours = TopKSAE(TopKConfig(d_in=32, d_sae=96, k=5), hook_point="transformer.h.1", source={"model": "gpt2"})
    ours.save(root / "ours")
    for folder in ("texts", "out"):
        (root / folder).mkdir()
    (root / "texts" / "texts.jsonl").write_text(documents_file.read_text() * 20)
    job = {
        "saes": {case: str(root / "ours" if case == "ours" else FIXTURES / case) for case in CASES},
        "tokenizer": str(tiny_model_dir("gpt2")),
        "texts": str(root / "texts"),
        "out": str(root / "out"),
    }
    python = Path(os.environ.get("SAEKIT_PEERS", ROOT / ".venv-peers")) / "saebench" / "bin" / "python"
    if not python.is_file():
        pytest.fail(f"no {python}; run scripts/test_peers, which makes it")
    ran = subprocess.run(
        [str(python), str(Path(__file__).with_name("saebench_worker.py"))],
        input=json.dumps(job),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "out" / "results.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_core_runs_on_the_dictionary_as_it_is(case: str, results: dict[str, Any]) -> None:
    found = results[case]
    metrics = found["metrics"]
    assert metrics["sparsity"]["l0"] > 0
    # It writes -1 where a number is missing or NaN.
    assert metrics["reconstruction_quality"]["mse"] > 0
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    assert -1 < metrics["reconstruction_quality"]["cossim"] <= 1
    if case == "ours":
        assert metrics["sparsity"]["l0"] == 5
    assert found["recorded"]["d_sae"] == (96 if case == "ours" else 128)
    assert found["asdict"]["hook_name"].startswith("blocks.")


@pytest.mark.parametrize("case", [case for case in CASES if case != "connor_attn"])
def test_probing_sees_our_activations(case: str, results: dict[str, Any]) -> None:
    for theirs, ours in zip(results[case]["meaned"], results[case]["by_hand"], strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4)
