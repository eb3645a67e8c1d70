"""Whatever the layout, several processes train the SAE that one process trains."""

import signal
from pathlib import Path

import pytest
import torch

from saekit.sae import load_sae_folder
from saekit.training import read_metrics
from tests.saekit.training import ranks

FIGURES = ("loss", "fvu", "auxk", "l0", "dead_fraction", "gradient_norm", "l0_coefficient", "resampled", "fvu_training")
TOLERANCE = 2e-5
"""Relative, of figures, and of weights absolute: float32 sums in another order, over 14 steps."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What two and four processes trained, and one."""
    out = {name: tmp_path_factory.mktemp(name) for name in ("two", "four", "one")}
    running = ranks.start(2, out["two"]), ranks.start(4, out["four"])
    ranks.train(out["one"], "data", tuple(ranks.SAES), (0, 1))
    try:
        for processes in running:
            for process in processes:
                process.join(timeout=300)
        # The first of two loses the second one at the end, and says so.
        assert [process.exitcode for process in running[0]] == [1, -signal.SIGKILL]
        assert [process.exitcode for process in running[1]] == [0] * 4
    finally:
        for process in (*running[0], *running[1]):
            process.kill()
    return out


CASES = [
    *(("two/data", kind) for kind in ranks.SAES),
    *(("two/latents", kind) for kind in ranks.EVERYWHERE),
    *(("four/mesh", kind) for kind in ranks.MESH),
    ("four/latents4", "topk"),
    ("four/latents4", "batchtopk"),
]


@pytest.mark.parametrize(("where", "kind"), CASES)
def test_processes_train_the_sae_that_one_trains(folders: dict[str, Path], where: str, kind: str) -> None:
    world, layout = where.split("/")
    found, single = folders[world] / layout / kind, folders["one"] / kind
    rows, expected = read_metrics(found), read_metrics(single)
    assert [(row["split"], row["step"]) for row in rows] == [(row["split"], row["step"]) for row in expected]
    assert ("resample" in {row["split"] for row in rows}) == (kind == "resampled")
    for row, other in zip(rows, expected, strict=True):
        for key in row.keys() & set(FIGURES):
            assert row[key] == pytest.approx(other[key], rel=TOLERANCE, abs=1e-7), (key, row, other)
    one = load_sae_folder(single)
    for name, value in load_sae_folder(found).named_parameters():
        torch.testing.assert_close(value, one.get_parameter(name), atol=TOLERANCE, rtol=TOLERANCE, msg=name)
