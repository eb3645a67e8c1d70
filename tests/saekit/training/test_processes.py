"""Whatever the layout, several processes train the SAE that one process trains."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from saekit.errors import ConfigError
from saekit.sae import load_sae_folder
from saekit.training import TrainConfig, check_options, finish, read_metrics, trainer
from saekit.training.arrays import restore_tensors, stage_tensors
from saekit.training.axis import Axis, float_of
from saekit.training.layers import shares
from saekit.training.layout import Layout, features_of, mesh_of
from saekit.training.shape import shape_of
from saekit.training.sharded_state import sliced_state, written_state
from saekit.training.state import latest_checkpoint, load_process, load_run
from saekit.training.wire import step_bytes
from tests.saekit.training import ranks

FIGURES = ("loss", "fvu", "auxk", "l0", "dead_fraction", "gradient_norm", "l0_coefficient", "resampled", "fvu_training")
TOLERANCE = 2e-5
"""Relative, of figures, and of weights absolute: float32 sums in another order, over 14 steps."""


@pytest.fixture(scope="module", autouse=True)
def _small_samples() -> Iterator[None]:
    """As in the other processes, and in this one for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, finish):
            patch.setattr(module, "SAMPLE_TOKENS", ranks.SAMPLE_TOKENS)
        yield


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
        lost = "training: process 0 of 2 lost process 1 was killed, or does not answer (connection closed)"
        assert (out["two"] / "killed" / "lost").read_text().startswith(lost)
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
    *(("two/turns", kind) for kind in ("topk", "jumprelu", "batchtopk")),
    ("four/turns", "matryoshka_topk"),
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
    # Moments of features drawn anew start at 0, and the first steps divide small gradients by small moments.
    tolerance = TOLERANCE * (5 if kind == "resampled" else 1)
    for name, value in load_sae_folder(found).named_parameters():
        torch.testing.assert_close(value, one.get_parameter(name), atol=tolerance, rtol=tolerance, msg=name)


def weights(folder: Path) -> bytes:
    return (folder / "sae.safetensors").read_bytes()


def test_features_are_spread_and_resume_to_the_same_bits(folders: dict[str, Path]) -> None:
    """The run that was interrupted is the one that was not."""
    assert weights(folders["two"] / "same") == weights(folders["two"] / "latents" / "jumprelu")


@pytest.mark.parametrize(
    ("where", "rows"), [("two/data", [15, 16]), ("two/latents", [16, 15]), ("four/mesh", [8, 8, 7, 8])]
)
def test_each_process_writes_its_part_of_a_checkpoint(folders: dict[str, Path], where: str, rows: list[int]) -> None:
    world, layout = where.split("/")
    (checkpoint,) = (folders[world] / layout / "topk" / "checkpoints").iterdir()
    files = {f"{name}" for rank in range(len(rows)) for name in (f"__{rank}_0.distcp", f"process_{rank}.pt")}
    assert {path.name for path in checkpoint.iterdir()} == files | {".metadata", "run.pt"}
    arrays = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for name in ("silent_tokens", "objective.sae.W_enc", "optimizer.state.0.exp_avg", "average.ema.W_dec"):
        array = arrays[name]
        assert isinstance(array, TensorStorageMetadata)
        # Each row once, also where two processes hold the same features.
        assert sorted(chunk.sizes[0] for chunk in array.chunks) == sorted(rows), name
        assert array.size[0] == ranks.D_SAE


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated"])
def test_layers_are_trained_as_alone(folders: dict[str, Path], kind: str) -> None:
    found = folders["two"] / "layers" / kind
    assert weights(found) == weights(folders["one"] / kind)
    assert load_sae_folder(found).source == load_sae_folder(folders["one"] / kind).source


def test_layers_tell_each_other_who_failed(folders: dict[str, Path]) -> None:
    out = folders["two"] / "layers"
    for rank in (0, 1):
        assert "1 of 3 trainings failed, the others are finished" in (out / f"error_{rank}").read_text()
    assert weights(out / "broken" / "topk") == weights(out / "topk")
    assert weights(out / "single") == weights(out / "topk")


@pytest.mark.parametrize("layout", ["latents", {"data": 1, "latents": 1}])
def test_a_layout_of_one_process_is_no_layout(folders: dict[str, Path], tmp_path: Path, layout: object) -> None:
    ranks.make_trainer("batchtopk", layout).fit(tmp_path)
    assert weights(tmp_path) == weights(folders["one"] / "batchtopk")


def test_a_process_that_is_killed_leaves_a_checkpoint_that_one_process_goes_on_from(folders: dict[str, Path]) -> None:
    folder = folders["two"] / "killed"
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    assert checkpoint.name in {"step_00000005", "step_00000010"}
    assert load_process(checkpoint, 1)["source"] == {"position": load_run(checkpoint)["run"]["step"]}
    ranks.make_trainer("topk").fit(folder)
    single = load_sae_folder(folders["one"] / "topk")
    for name, value in load_sae_folder(folder).named_parameters():
        torch.testing.assert_close(value, single.get_parameter(name), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("where", "kind", "data", "latents"),
    [
        ("two/data", "gated", 2, 1),
        ("two/latents", "skip", 1, 2),
        ("two/latents", "gated", 1, 2),
        ("four/mesh", "topk", 2, 2),
    ],
)
def test_bytes_sent_are_those_of_the_formulas(
    folders: dict[str, Path], where: str, kind: str, data: int, latents: int
) -> None:
    world, layout = where.split("/")
    # Steps 1 and 2: whole batches, and no feature is dead yet.
    row = next(row for row in read_metrics(folders[world] / layout / kind) if row["split"] == "train")
    sent = row["bytes_per_step_by_purpose"]
    assert isinstance(sent, dict)
    assert row["bytes_per_step"] == pytest.approx(sum(sent.values()))
    config = TrainConfig.parse(ranks.TRAINING)
    expected = step_bytes(shape_of(ranks.SAES[kind]), config, data=data, latents=latents, active=3)
    for purpose, count in expected.items():
        assert sent.get(purpose, 0.0) == pytest.approx(count, abs=2.0), purpose


@pytest.mark.parametrize(
    ("layout", "processes", "message"),
    [
        ("data", 3, "batch_size 64, needs a multiple of 3 processes"),
        ({"data": 2, "latents": 2}, 3, "layout data 2 x latents 2, needs 4 processes, there are 3"),
    ],
)
def test_layout_that_does_not_fit_the_processes_is_refused(layout: object, processes: int, message: str) -> None:
    made = ranks.make_trainer("topk", layout)
    with pytest.raises(ConfigError, match=message):
        place = mesh_of(made.config.layout, processes)
        alone = Layout.alone()
        alone.data.size = place.data
        made.open_source(alone, contextlib.ExitStack())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("crosscoder", {}, "'crosscoder_topk', whose features have a part at each hook point"),
        ("resampled", {}, "resample, which draws from all features"),
        ("topk", {"optimizer": "muon"}, "optimizer 'muon', which orthogonalises whole matrices"),
        ("topk", {"optimizer": "adamw8bit"}, "optimizer 'adamw8bit', whose blocks of moments would be cut"),
        ("topk", {"objective": {"kind": "e2e"}}, "objective 'e2e', which needs whole reconstructions in the model"),
    ],
)
def test_features_that_cannot_be_spread_are_refused(kind: str, options: dict[str, object], message: str) -> None:
    config = TrainConfig.parse(ranks.TRAINING | ranks.OPTIONS.get(kind, {}) | options | {"layout": "latents"})
    with pytest.raises(
        ConfigError, match=f"layout with features over processes and {message}, needs 'data' or 'layers'"
    ):
        check_options(ranks.SAES[kind], config)


def test_features_are_cut_and_joined_by_their_index() -> None:
    slices = [features_of(31, rank, 4) for rank in range(4)]
    assert [(part.start, part.stop) for part in slices] == [(0, 8), (8, 16), (16, 24), (24, 31)]
    with pytest.raises(ConfigError, match="layout latents over 4 processes, needs at least as many features"):
        features_of(3, 0, 4)


def held(features: int, data: int) -> Layout:
    """The layout of a process of three columns and two rows."""
    layout = Layout.alone()
    layout.latents.rank, layout.latents.size = features, 3
    layout.data.rank, layout.data.size = data, 2
    return layout


def leaves(state: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Yields the values of nested dicts, by their place."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{place}.{key}")
    else:
        yield place, state


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_state_by_features_is_cut_and_joined_to_the_same_bits(folders: dict[str, Path], kind: str) -> None:
    (checkpoint,) = (folders["one"] / kind / "checkpoints").iterdir()
    state = load_run(checkpoint)["run"]
    arrays: dict[str, dict[int, Tensor]] = {}
    for rank in range(6):
        layout = held(rank % 3, rank // 3)
        part = sliced_state(state, layout.features(31))
        assert len(part["objective"]["sae.b_enc"]) == (11, 10, 10)[rank % 3]
        named, rows = stage_tensors(written_state(part, layout, 31), rank=rank, world_size=6)
        for name, found in rows.items():
            parts = arrays.setdefault(name, {})
            if len(found.tensor):
                assert found.start not in parts, name
                parts[found.start] = found.tensor
    joined = restore_tensors(
        named, {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in arrays.items()}
    )
    for (place, value), (other_place, other) in zip(leaves(joined), leaves(state), strict=True):
        assert place == other_place
        assert torch.equal(value, other) if isinstance(other, Tensor) else value == other, place


def test_kth_largest_is_exact_with_ties_and_nan() -> None:
    values = torch.tensor([0.0, 2.0, 2.0, 1e-30, 5.5, float("inf"), 1.0])
    found = [float_of(Axis().kth_largest(values, k)).item() for k in range(1, 9)]
    assert found == [float("inf"), 5.5, 2.0, 2.0, 1.0, values[3].item(), 0.0, 0.0]
    assert float_of(Axis().kth_largest(torch.tensor([float("nan"), 1.0]), 2)).item() == 1.0


def test_saes_are_shared_out_by_their_cost() -> None:
    costs = {Path("a"): 4.0, Path("b"): 3.0, Path("c"): 2.0}
    assert shares(costs, 2) == [[Path("a")], [Path("b"), Path("c")]]
    assert shares(costs, 4)[3] == []
