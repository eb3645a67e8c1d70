"""A run that is killed, interrupted or fails goes on bit for bit where its last checkpoint is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from saekit.errors import ConfigError, FormatError, ResourceError
from saekit.hub import load_sae
from saekit.sae import JumpReLUConfig, SAEConfig, TopKConfig, build_sae
from saekit.training import TrainConfig, Trainer, read_metrics
from saekit.training import background as background_module
from saekit.training import loop as loop_module
from saekit.training.metrics import SPEED_FIELDS
from saekit.training.state import load_run, publish_checkpoint

TOPK = TopKConfig(d_in=16, d_sae=32, k=2)
JUMPRELU = JumpReLUConfig(d_in=16, d_sae=32, target_l0=2)
# A checkpoint in every 13 steps, a row in every 3: no period divides another, so rows and checkpoints fall anyhow. Features
# die early, so the AuxK counters matter too.
CONFIG = TrainConfig(
    num_tokens=60 * 128,
    batch_size=128,
    lr=1e-2,
    log_every_tokens=3 * 128,
    eval_every_tokens=10 * 128,
    eval_tokens=512,
    checkpoint_every_tokens=13 * 128,
    dead_after_tokens=512,
)
SAMPLE_STEPS = 256  # 32,768 tokens are read for the start before the first step


def train(planted: ModuleType, cfg: SAEConfig, out: Path, *, stop_at: int | None = None, number: int = 0) -> None:
    """Trains; at step `stop_at` the process gets signal `number` in the middle of reading a batch."""
    source = planted.PlantedSource(batch_size=128)
    view = planted.PlantedView(source, num_batches=8)
    if stop_at is not None:
        source.kill_at, source.signal = stop_at, number
        # The start reads far ahead and comes back: the signal is meant for the loop.
        source.armed_after = SAMPLE_STEPS
    Trainer(build_sae(cfg), source, CONFIG, test=view).fit(out)


def contents(out: Path) -> tuple[bytes, list[dict[str, object]]]:
    """The weights' bytes and the metrics without times."""
    rows = read_metrics(out)
    for row in rows:
        for name in SPEED_FIELDS:
            row.pop(name, None)
    return (out / "sae.safetensors").read_bytes(), rows


@pytest.fixture(scope="module", params=[TOPK, JUMPRELU], ids=["topk", "jumprelu"])
def uninterrupted(
    request: pytest.FixtureRequest, planted: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SAEConfig, bytes, list[dict[str, object]]]:
    out = tmp_path_factory.mktemp("whole")
    train(planted, request.param, out)
    weights, rows = contents(out)
    assert any(row.get("auxk") for row in rows)
    return request.param, weights, rows


SCRIPT = """
import importlib.util, sys, json, torch
torch.set_num_threads(1)
from pathlib import Path
sys.path[:0] = [{here!r}]
import planted
spec = importlib.util.spec_from_file_location("test_resume", {here!r} + "/test_resume.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.train(planted, getattr(module, {name!r}), Path({out!r}), stop_at={stop_at}, number={number})
"""


def run_in_process(cfg: SAEConfig, out: Path, *, stop_at: int, number: int) -> subprocess.CompletedProcess[str]:
    name = "TOPK" if cfg is TOPK else "JUMPRELU"
    script = SCRIPT.format(
        here=str(Path(__file__).parent), name=name, out=str(out), stop_at=stop_at, number=int(number)
    )
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_killed_run_goes_on_bit_for_bit(
    planted: ModuleType, uninterrupted: tuple[SAEConfig, bytes, list[dict[str, object]]], tmp_path: Path
) -> None:
    cfg, weights, rows = uninterrupted
    found = run_in_process(cfg, tmp_path, stop_at=47, number=signal.SIGKILL)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert not (tmp_path / "sae.safetensors").exists()
    # The one of step 39 was begun once this one was in place.
    assert (tmp_path / "checkpoints" / "step_00000026").is_dir()
    assert len(read_metrics(tmp_path)) > sum(1 for row in rows if int(str(row["step"])) <= 39)
    with pytest.raises(FormatError, match="training has not finished; run it again to resume it"):
        load_sae(tmp_path)
    train(planted, cfg, tmp_path)
    assert contents(tmp_path) == (weights, rows)


@pytest.fixture
def _python_handles_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_python_handles_interrupts")
def test_ctrl_c_writes_a_checkpoint_says_how_to_go_on_and_loses_no_step(
    planted: ModuleType, uninterrupted: tuple[SAEConfig, bytes, list[dict[str, object]]], tmp_path: Path
) -> None:
    cfg, weights, rows = uninterrupted
    with pytest.raises(KeyboardInterrupt, match=r"interrupted after 2,\d+ tokens, .* run the same again to go on"):
        train(planted, cfg, tmp_path, stop_at=17, number=signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    newest = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1]
    assert newest in {"step_00000018", "step_00000019"}
    train(planted, cfg, tmp_path)
    assert contents(tmp_path) == (weights, rows)


@pytest.mark.usefixtures("_python_handles_interrupts")
def test_ctrl_c_in_the_last_step_is_heard(
    planted: ModuleType, uninterrupted: tuple[SAEConfig, bytes, list[dict[str, object]]], tmp_path: Path
) -> None:
    cfg, weights, rows = uninterrupted
    with pytest.raises(KeyboardInterrupt, match="checkpoint written"):
        train(planted, cfg, tmp_path, stop_at=CONFIG.num_steps - 1, number=signal.SIGINT)
    assert not (tmp_path / "sae.safetensors").exists()
    train(planted, cfg, tmp_path)
    assert contents(tmp_path) == (weights, rows)


def test_run_killed_before_its_first_checkpoint_starts_anew(
    planted: ModuleType,
    uninterrupted: tuple[SAEConfig, bytes, list[dict[str, object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg, weights, rows = uninterrupted
    with monkeypatch.context() as patched:
        patched.setattr(loop_module.TrainingLoop, "save", _fail)
        with pytest.raises(RuntimeError, match="power cut"):
            train(planted, cfg, tmp_path)
    assert read_metrics(tmp_path)
    train(planted, cfg, tmp_path)
    assert contents(tmp_path) == (weights, rows)


def _fail(*args: object) -> None:
    raise RuntimeError("power cut")


def test_checkpoint_that_was_cut_off_is_cleared_and_the_one_before_used(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(planted, TOPK, tmp_path / "whole")

    def fail_second(out: Path, step: int) -> Path:
        if step == 26:
            raise EOFError("power cut")
        return publish_checkpoint(out, step)

    with monkeypatch.context() as patched:
        patched.setattr(background_module, "publish_checkpoint", fail_second)
        with pytest.raises(EOFError, match="power cut"):
            train(planted, TOPK, tmp_path / "cut")
    names = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert names == [".step_00000026", "step_00000013"]
    train(planted, TOPK, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*"))


def stopped_run(planted: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, cfg: SAEConfig = TOPK) -> Path:
    """A run that stopped after its second checkpoint; returns that checkpoint."""
    save = loop_module.TrainingLoop.save

    def save_then_fail(self: loop_module.TrainingLoop) -> None:
        save(self)
        if self.run.step == 26:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(loop_module.TrainingLoop, "save", save_then_fail)
        with pytest.raises(RuntimeError, match="power cut"):
            train(planted, cfg, out)
    return out / "checkpoints" / "step_00000026"


@pytest.mark.parametrize("name", ["run.pt", "process_0.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("size", [0, 100])
def test_broken_checkpoint_names_the_file_and_the_remedy(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    checkpoint = stopped_run(planted, tmp_path, monkeypatch)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:size])
    shown = ".metadata' or a file that it names" if name.startswith((".", "_")) else f"{name}'"
    with pytest.raises(FormatError, match=rf"{shown}: cannot be read: .*; remove '.*step_00000026' to go on") as caught:
        train(planted, TOPK, tmp_path)
    assert "\n" not in str(caught.value)


def test_other_config_does_not_take_over_a_stopped_run(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(planted, tmp_path, monkeypatch)
    config = TrainConfig.parse(CONFIG.to_dict() | {"seed": 7})
    source = planted.PlantedSource(batch_size=128)
    with pytest.raises(ConfigError, match=r"training.seed \(0 there, 7 asked\)"):
        Trainer(build_sae(TOPK), source, config).fit(tmp_path)


def test_full_disk_while_saving_is_one_line_and_keeps_the_checkpoint_before(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = background_module.write_rows

    def full(folder: Path, *args: object) -> object:
        if folder.name == ".step_00000026":
            raise OSError(28, "No space left on device")
        return write(folder, *args)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(background_module, "write_rows", full)
    with pytest.raises(
        ResourceError, match=r"step_00000026': checkpoint cannot be written: .*No space left.*the one before is kept"
    ) as caught:
        train(planted, TOPK, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000013"]


def test_checkpoint_of_the_format_before_is_read(
    planted: ModuleType,
    uninterrupted: tuple[SAEConfig, bytes, list[dict[str, object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg, weights, rows = uninterrupted
    checkpoint = stopped_run(planted, tmp_path, monkeypatch, cfg)
    state = load_run(checkpoint)
    # That format had all tensors in one file, and measured the data anew.
    del state["run"]["normalization"], state["num_processes"]
    for name in (".metadata", "__0_0.distcp"):
        (checkpoint / name).unlink()
    torch.save(state, checkpoint / "run.pt")
    train(planted, cfg, tmp_path)
    assert contents(tmp_path) == (weights, rows)


def test_half_a_row_of_metrics_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "fv')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none") == []
