"""The whole stage: recovery of a planted dictionary, target L0, folder, refusals."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saekit.errors import ConfigError, NonFiniteError, ResourceError
from saekit.manifest import read_manifest
from saekit.sae import BatchTopKConfig, JumpReLUConfig, SAEConfig, TopKConfig, build_sae, load_sae_folder
from saekit.training import TrainConfig, Trainer, read_metrics
from saekit.training.heldout import heldout_figures
from saekit.training.metrics import SPEED_FIELDS

TOPK = TopKConfig(d_in=16, d_sae=32, k=2)
BATCHTOPK = BatchTopKConfig(d_in=16, d_sae=32, k=2)
JUMPRELU = JumpReLUConfig(d_in=16, d_sae=32, target_l0=2)


def short(**changes: object) -> TrainConfig:
    values: dict[str, object] = {"num_tokens": 10_240, "batch_size": 256, "checkpoint_every_tokens": 2560}
    return TrainConfig.parse(values | changes)


@pytest.mark.parametrize("cfg", [TOPK, BATCHTOPK, JUMPRELU], ids=["topk", "batchtopk", "jumprelu"])
def test_planted_dictionary_is_recovered(planted: ModuleType, cfg: SAEConfig, tmp_path: Path) -> None:
    source = planted.PlantedSource()
    sae = build_sae(cfg)
    before = planted.mean_max_cosine(sae.W_dec, source.directions)
    config = TrainConfig(num_tokens=256 * 500, batch_size=256)
    trained = Trainer(sae, source, config, test=planted.PlantedView(source)).fit(tmp_path)
    assert trained is sae
    assert before < 0.75
    assert planted.mean_max_cosine(sae.W_dec, source.directions) > 0.95
    figures = read_metrics(tmp_path)[-1]
    assert figures["split"] == "test"
    assert isinstance(figures["fvu"], float)
    assert figures["fvu"] < 0.2


@pytest.mark.parametrize(("target", "num_steps"), [(2.0, 400), (6.0, 250), (10.0, 400)])
def test_target_l0_is_met_on_held_out_tokens(
    planted: ModuleType, target: float, num_steps: int, tmp_path: Path
) -> None:
    source = planted.PlantedSource(d_in=24, num_features=96, firing=0.06)
    cfg = JumpReLUConfig(d_in=24, d_sae=192, target_l0=target)
    sae = Trainer(build_sae(cfg), source, TrainConfig(num_tokens=256 * num_steps, batch_size=256)).fit(tmp_path)
    acts = sae.encode(planted.PlantedView(source, num_batches=40).x)
    assert float((acts > 0).sum(1).double().mean()) == pytest.approx(target, rel=0.05)
    assert 0.85 < float(str(sae.source["threshold_factor"])) < 1.15


@pytest.mark.parametrize("cfg", [TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def test_folder_holds_an_sae_of_raw_activations(planted: ModuleType, cfg: SAEConfig, tmp_path: Path) -> None:
    source = planted.PlantedSource(scale=50.0)
    view = planted.PlantedView(source)
    sae = Trainer(build_sae(cfg, hook_point="model.layers.2"), source, short(), test=view).fit(tmp_path / "sae")
    loaded = load_sae_folder(tmp_path / "sae")
    output = loaded(view.x)
    assert torch.equal(output.x_hat, sae(view.x).x_hat)
    assert loaded.hook_point == "model.layers.2"
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)

    x = view.x.double()
    fvu = float((x - output.x_hat.detach()).square().sum() / (x - x.mean(0)).square().sum())
    manifest = read_manifest(tmp_path / "sae")
    assert manifest is not None
    assert (manifest.stage, manifest.status) == ("train", "complete")
    assert manifest.counts["tokens"] == 10_240
    assert manifest.counts["steps"] == 40
    assert manifest.counts["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert manifest.counts["l0"] == pytest.approx(float((output.top_acts > 0).sum() / len(x)))
    assert manifest.config["sae"] == cfg.to_dict()
    header = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert header["source"]["fvu"] == manifest.counts["fvu"]
    assert [path.name for path in (tmp_path / "sae" / "checkpoints").iterdir()] == ["step_00000030"]


def test_metrics_have_a_row_for_every_log_point(planted: ModuleType, tmp_path: Path) -> None:
    source = planted.PlantedSource()
    config = short(log_every_tokens=512, eval_every_tokens=2560, eval_tokens=1024)
    Trainer(build_sae(TOPK), source, config, test=planted.PlantedView(source)).fit(tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["tokens"] for row in rows if row["split"] == "train"] == list(range(512, 10_241, 512))
    assert [row["tokens"] for row in rows if row["split"] == "test"] == [2560, 5120, 7680, 10_240]
    for row in rows:
        keys = {"split", "step", "tokens", "fvu", "l0", "dead_fraction"}
        extra = (
            {"loss", "auxk", "lr", "gradient_norm", "l0_coefficient", *SPEED_FIELDS} - {"mfu"}
            if row["split"] == "train"
            else set()
        )
        assert set(row) == keys | extra
        assert all(float(row[name]) >= 0 for name in extra & set(SPEED_FIELDS))


class _Recorder:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.done = 0
        self.total = 0
        self.figures: dict[str, float | str] = {}

    def say(self, message: str) -> None:
        self.messages.append(message)

    @contextmanager
    def task(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator["_Recorder"]:
        assert (name, unit) == ("train", "tokens")
        self.done, self.total = done, total
        yield self

    def advance(self, amount: int = 1, **figures: float | str) -> None:
        self.done += amount
        self.figures = figures


def test_progress_counts_tokens_and_shows_figures_and_a_second_call_only_loads(
    planted: ModuleType, tmp_path: Path
) -> None:
    recorder = _Recorder()
    first = Trainer(build_sae(TOPK), planted.PlantedSource(), short()).fit(tmp_path, progress=recorder)
    assert recorder.done == recorder.total == 10_240
    assert {"fvu", "l0", "dead"} <= recorder.figures.keys()
    source, again = planted.PlantedSource(), _Recorder()
    second = Trainer(build_sae(TOPK, seed=9), source, short()).fit(tmp_path, progress=again)
    assert again.messages == [f"{tmp_path}: already trained"]
    assert source.position == 0
    assert torch.equal(first.W_enc, second.W_enc)


def test_given_weights_are_where_training_goes_on_from(planted: ModuleType, tmp_path: Path) -> None:
    source = planted.PlantedSource()
    view = planted.PlantedView(source)
    sae = Trainer(build_sae(TOPK), source, TrainConfig(num_tokens=25_600, batch_size=256)).fit(tmp_path / "first")
    before = (view.x - sae(view.x).x_hat).square().mean().detach()
    config = short(num_tokens=256, init="given", lr=1e-8)
    more = Trainer(sae, planted.PlantedSource(), config).fit(tmp_path / "second")
    after = (view.x - more(view.x).x_hat).square().mean().detach()
    assert float(after) == pytest.approx(float(before), rel=1e-3)


@pytest.mark.parametrize(
    ("cfg", "config", "message"),
    [
        pytest.param(TOPK, {"lr": 1.0}, r"written with another config: training.lr \(None there, 1.0 asked\)", id="lr"),
        pytest.param(TopKConfig(d_in=16, d_sae=32, k=3), {}, r"sae.k \(2 there, 3 asked\)", id="k"),
    ],
)
def test_folder_of_another_run_is_refused(
    planted: ModuleType, cfg: SAEConfig, config: dict[str, object], message: str, tmp_path: Path
) -> None:
    Trainer(build_sae(TOPK), planted.PlantedSource(), short(num_tokens=256)).fit(tmp_path)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        Trainer(build_sae(cfg), planted.PlantedSource(), short(num_tokens=256, **config)).fit(tmp_path)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before


def test_data_of_another_width_is_refused_before_anything_is_written(planted: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training data: activations are 24 wide, needs the SAE's d_in = 16"):
        Trainer(build_sae(TOPK), planted.PlantedSource(d_in=24), short())
    view = planted.PlantedView(planted.PlantedSource(d_in=24), num_batches=1)
    with pytest.raises(ConfigError, match=r"test data: activations are 24 wide"):
        Trainer(build_sae(TOPK), planted.PlantedSource(), short(), test=view)


def test_jumprelu_without_a_target_is_refused(planted: ModuleType) -> None:
    sae = build_sae(JumpReLUConfig(d_in=16, d_sae=32))
    with pytest.raises(ConfigError, match="no target_l0, needs one to train a JumpReLU SAE"):
        Trainer(sae, planted.PlantedSource(), short())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"num_tokens": 0}, "num_tokens: found 0", id="no-tokens"),
        pytest.param({"batch_size": -1}, "batch_size: found -1", id="batch"),
        pytest.param({"lr": 0.0}, "lr: found 0.0", id="lr"),
        pytest.param({"warmup_fraction": 0.9, "decay_fraction": 0.5}, "is 1.4, needs at most 1", id="schedule"),
        pytest.param({"learning_rate": 1e-3}, "unknown key 'learning_rate'", id="unknown"),
        pytest.param({"sparsity": {"dead_loss": "magic"}}, "sparsity.dead_loss: found 'magic'", id="choice"),
    ],
)
def test_bad_training_configs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        short(**changes)


def test_nan_in_the_data_stops_with_the_step_and_stays_resumable(planted: ModuleType, tmp_path: Path) -> None:
    source = planted.PlantedSource()
    source.nan_at = 20
    config = short(num_tokens=256 * 150)
    with pytest.raises(NonFiniteError, match=r"1 of the first [0-9]+ activations have NaN or Inf"):
        Trainer(build_sae(TOPK), source, config).fit(tmp_path)
    late = planted.PlantedSource()
    late.nan_at = 140
    with pytest.raises(NonFiniteError, match=r"training step 141: 1 of 256 activations in the batch"):
        Trainer(build_sae(TOPK), late, config).fit(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.status == "running"
    Trainer(build_sae(TOPK), planted.PlantedSource(), config).fit(tmp_path)


def test_folder_that_cannot_be_written_is_an_error_of_one_line(planted: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written"):
        Trainer(build_sae(TOPK), planted.PlantedSource(), short()).fit(tmp_path / "file" / "run")


def test_default_config_runs(planted: ModuleType, tmp_path: Path) -> None:
    source = planted.PlantedSource(batch_size=4096)
    sae = Trainer(build_sae(TOPK), source, TrainConfig(num_tokens=12_288)).fit(tmp_path)
    assert bool(torch.isfinite(sae.W_dec).all())


def test_batchtopk_has_its_l0_and_fvu_under_both_rules(planted: ModuleType, tmp_path: Path) -> None:
    source = planted.PlantedSource()
    sae = Trainer(build_sae(BATCHTOPK), source, short(), test=planted.PlantedView(source)).fit(tmp_path)
    row = [row for row in read_metrics(tmp_path) if row["split"] == "test"][-1]
    assert row["l0_training"] == 2.0
    assert row["l0"] == pytest.approx(2.0, rel=0.15)
    assert row["l0"] != 2.0
    assert row["fvu_training"] == pytest.approx(row["fvu"], rel=0.2)
    for name in ("l0_training", "fvu_training", "l0", "fvu"):
        assert sae.source[name] == pytest.approx(row[name], rel=1e-3), name
    # With another threshold inference has another L0, and training the same one.
    sae.get_parameter("threshold").data.mul_(2)
    figures = heldout_figures(sae, planted.PlantedView(source).x)
    assert figures["l0_training"] == 2.0
    assert figures["l0"] < 1.9
