"""What trackers are told: every row of figures once, under a run of the SAE's own, whatever happens to the training."""

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.state import PartialState
from accelerate.utils import is_tensorboard_available

from saekit.activations import ActivationStore
from saekit.errors import ConfigError, MissingDependencyError
from saekit.progress import NO_PROGRESS
from saekit.sae import TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, check_trackers, read_metrics, train_together
from saekit.training import loop as loop_module
from saekit.training import trackers as trackers_module
from saekit.training import trainer as trainer_module
from saekit.training.layout import Layout

CFG = TopKConfig(d_in=16, d_sae=32, k=2)
BATCH = 64


class Recorder(tracking.GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """Keeps what it is told, by run."""

    name = "recorder"
    requires_logging_directory = False
    made: ClassVar[list["Recorder"]] = []

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.run_name = run_name
        self.config: dict[str, object] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        Recorder.made.append(self)

    @property
    def tracker(self) -> "Recorder":
        return self

    @tracking.on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.config = values

    @tracking.on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
        assert step is not None
        self.rows.append((step, values))

    @tracking.on_main_process  # type: ignore[untyped-decorator]  # accelerate has no types
    def finish(self) -> None:
        self.finished += 1


class Sayings:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def task(self, *args: object, **kwargs: object) -> Any:
        return NO_PROGRESS.task("", 0, "")


@pytest.fixture(autouse=True)
def _recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(trainer_module, "SAMPLE_TOKENS", 4 * BATCH)


def config(*names: str, **more: object) -> TrainConfig:
    values: dict[str, object] = {
        "num_tokens": 12 * BATCH,
        "batch_size": BATCH,
        "log_every_tokens": BATCH,
        "eval_every_tokens": 6 * BATCH,
        "checkpoint_every_tokens": 4 * BATCH,
        "trackers": names,
    }
    return TrainConfig.parse(values | more)


def trainer(planted: ModuleType, settings: TrainConfig) -> Trainer:
    source = planted.PlantedSource(batch_size=BATCH)
    return Trainer(build_sae(CFG), source, settings, test=planted.PlantedView(source, num_batches=1))


def expected(out: Path) -> list[tuple[object, str]]:
    return [(row["step"], str(row["split"])) for row in read_metrics(out)]


def told() -> list[tuple[object, str]]:
    """Steps and splits of what all recorders were told, in order."""
    return [(step, next(iter(values)).partition("/")[0]) for made in Recorder.made for step, values in made.rows]


def test_every_row_of_figures_is_told_under_the_saes_name(planted: ModuleType, tmp_path: Path) -> None:
    trainer(planted, config("recorder", tracker_run="sweep")).fit(tmp_path / "topk")
    (made,) = Recorder.made
    assert (made.run_name, made.finished) == ("sweep/topk", 1)
    assert made.config["sae/k"] == 2
    assert made.config["training/batch_size"] == BATCH
    assert told() == expected(tmp_path / "topk")
    for (_, values), row in zip(made.rows, read_metrics(tmp_path / "topk"), strict=True):
        figures = {key: value for key, value in row.items() if isinstance(value, float)}
        assert {key.partition("/")[2]: value for key, value in values.items()}.items() >= figures.items()
    # A finished folder begins no run.
    trainer(planted, config("recorder")).fit(tmp_path / "topk")
    assert len(Recorder.made) == 1


def stop(
    planted: ModuleType, out: Path, how: str, monkeypatch: pytest.MonkeyPatch, step: int, *, tracker: str = "recorder"
) -> None:
    """A training that ends after `step`, by an error or by Ctrl-C."""
    made = trainer(planted, config(tracker))
    advance = loop_module.TrainingLoop.advance

    def broken(self: loop_module.TrainingLoop, *, stop_asked: bool = False) -> object:
        figures = advance(self, stop_asked=stop_asked or (how == "Ctrl-C" and self.run.step + 1 == step))
        if how == "error" and self.run.step == step:
            self.wait()
            raise RuntimeError("power cut")
        return figures

    with monkeypatch.context() as patched:
        patched.setattr(loop_module.TrainingLoop, "advance", broken)
        with pytest.raises((RuntimeError, KeyboardInterrupt), match=r"power cut|interrupted"):
            made.fit(out)


@pytest.mark.parametrize("how", ["error", "Ctrl-C"])
def test_training_that_ends_early_closes_its_runs_and_tells_no_step_twice_when_gone_on_with(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    # Two stops: rows of steps 5 to 7 are made three times, that of step 6 when the log has lost it.
    for step in (7, 6) if how == "error" else (7,):
        stop(planted, tmp_path, how, monkeypatch, step)
        assert [made.finished for made in Recorder.made] == [1] * len(Recorder.made)
    trainer(planted, config("recorder")).fit(tmp_path)
    assert [made.finished for made in Recorder.made] == [1] * len(Recorder.made)
    assert told() == expected(tmp_path)
    assert [bool(made.config) for made in Recorder.made] == [True] + [False] * (len(Recorder.made) - 1)


def test_tracker_that_joins_later_is_told_what_comes(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(loop_module.TrainingLoop, "save", lambda self: (_ for _ in ()).throw(RuntimeError("full")))
        with pytest.raises(RuntimeError, match="full"):
            trainer(planted, config()).fit(tmp_path)
    assert not (tmp_path / trackers_module.TRACKERS_NAME).exists()
    trainer(planted, config("recorder")).fit(tmp_path)
    assert told() == expected(tmp_path)


def test_tracker_that_fails_is_left_out_and_said_once(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Recorder, values: object, step: int | None = None) -> None:
        self.rows.append((step or 0, {}))
        if step == 3:
            raise OSError("no route to host\nmore")

    monkeypatch.setattr(Recorder, "log", broken)
    sayings = Sayings()
    trainer(planted, config("recorder")).fit(tmp_path, progress=sayings)
    assert [step for step, _ in Recorder.made[0].rows] == [1, 2, 3]
    failed = [said for said in sayings.said if "failed" in said]
    assert failed == [
        f"{tmp_path}: tracker 'recorder' failed and is left out from here on: no route to host; metrics.jsonl has every figure"
    ]


def test_tracker_that_cannot_start_is_one_line_before_anything_is_read(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "store_init_configuration", lambda *_: 1 / 0)
    made = trainer(planted, config("recorder"))
    with pytest.raises(
        ConfigError, match="tracker 'recorder' cannot be started: division by zero; set it up, or leave"
    ):
        made.fit(tmp_path)
    assert made.train.read == 0  # type: ignore[union-attr]  # a planted source


def test_unknown_tracker_and_missing_package_are_named(planted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"found tracker 'tensorbord', needs one of aim, .*, tensorboard, "):
        trainer(planted, config("tensorbord"))
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(MissingDependencyError, match="tracker 'wandb', needs the package wandb; pip install wandb, or"):
        check_trackers(["recorder", "wandb"])


def test_only_the_process_that_writes_the_folder_tells(tmp_path: Path) -> None:
    layout = Layout.alone()
    layout.everyone.rank, layout.everyone.size = 1, 2
    problems: list[str | None] = ["said by the first one", None]
    layout.told = lambda value: problems.pop()  # type: ignore[method-assign]  # stands in for a broadcast
    with contextlib.ExitStack() as stack:
        arguments = {"values": {}, "progress": Sayings()}
        assert trackers_module.open_trackers(tmp_path, config("recorder"), layout, stack, **arguments) is None  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="said by the first one"):
            trackers_module.open_trackers(tmp_path, config("recorder"), layout, stack, **arguments)  # type: ignore[arg-type]
    assert not Recorder.made


def test_a_process_that_is_not_the_launchers_first_tells_of_its_own_saes(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's trackers would be silent there."""
    PartialState()
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    monkeypatch.setattr(PartialState, "use_distributed", property(lambda self: True))
    trainer(planted, config("recorder")).fit(tmp_path)
    assert told() == expected(tmp_path)
    assert Recorder.made[0].finished == 1


def test_saes_on_one_read_have_runs_of_their_own(store: ActivationStore, tmp_path: Path) -> None:
    train, test = store.split(test_fraction=0.2)
    cfg = TopKConfig(d_in=store.d_in, d_sae=32, k=2)
    folders = [tmp_path / "a", tmp_path / "b"]
    train_together({folder: Trainer(build_sae(cfg), train, config("recorder"), test=test) for folder in folders})
    assert [made.run_name for made in Recorder.made] == ["a", "b"]
    for folder, made in zip(folders, Recorder.made, strict=True):
        assert [step for step, _ in made.rows] == [step for step, _ in expected(folder)]
        assert made.finished == 1
    several = {folder: Trainer(build_sae(cfg), train, config("recorder")) for folder in folders}
    for trainer in several.values():
        trainer.config = config("mlflow")
    with pytest.raises(
        ConfigError, match="tracker 'mlflow' has one run at a time, found 2 SAEs on one read; train them"
    ):
        train_together(several)


def test_trackers_are_no_part_of_what_is_trained() -> None:
    assert config("recorder", tracker_project="p", tracker_run="r").identity == config().identity


def events(folder: Path) -> Iterator[tuple[int, bytes]]:
    """Steps and contents of the events in TensorBoard's files."""
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            # Length, its checksum, a protocol buffer, its checksum; field 2 of an event is the step.
            (length,) = struct.unpack("<Q", data[:8])
            event, data = data[12 : 12 + length], data[16 + length :]
            place = 9
            step, shift = 0, 0
            if event[place : place + 1] == b"\x10":
                for byte in event[place + 1 :]:
                    step, shift = step | (byte & 127) << shift, shift + 7
                    if byte < 128:
                        break
            yield step, event


@pytest.mark.skipif(not is_tensorboard_available(), reason="neither tensorboard nor tensorboardX is installed")
def test_tensorboard_has_each_step_once_after_a_resume(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(planted, tmp_path, "error", monkeypatch, 7, tracker="tensorboard")
    trainer(planted, config("tensorboard")).fit(tmp_path)
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2
    losses = [step for step, event in events(tmp_path / "tensorboard") if b"train/loss" in event]
    assert losses == list(range(1, 13))
    assert json.loads((tmp_path / "trackers.json").read_text())["tensorboard"]["rows"] == 8
