"""Kills at any instant, other numbers of processes, and restarts by the launcher: the SAE is that of one run on one process."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from saekit.sae import load_sae_folder
from saekit.training.state import latest_checkpoint, load_process, load_run
from tests.saekit.training import fleet
from tests.saekit.training.ranks import forks, free_port


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    run(out, 1)
    return out


def run(out: Path, world_size: int, stop_after: int | None = None) -> None:
    port = free_port()
    running = [
        forks().Process(target=fleet.run_rank, args=(str(out), rank, world_size, port, stop_after))
        for rank in range(world_size)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
        assert process.exitcode == 0


@pytest.mark.parametrize(("world_size", "wanted"), [(1, 14), (2, 6)])
def test_kills_at_any_instant_leave_whole_checkpoints_and_change_nothing(
    whole: Path, tmp_path: Path, world_size: int, wanted: int
) -> None:
    """Of two processes, all or one are killed; the other one ends by itself."""
    chance, kills, found = random.Random(6), 0, [tmp_path / "0"]
    steps = [0]
    while kills < wanted:
        started, port = tmp_path / f"started_{kills}_{len(found)}", free_port()
        running = [
            forks().Process(target=fleet.run_until_killed, args=(str(found[-1]), str(started), rank, world_size, port))
            for rank in range(world_size)
        ]
        for process in running:
            process.start()
        while running[0].is_alive() and not started.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.06))
        for process in running if chance.random() < 0.5 else [chance.choice(running)]:
            process.kill()
        for process in running:
            process.join(60)
        codes = {process.exitcode for process in running}
        assert codes <= {0, 1, -signal.SIGKILL}
        kills += -signal.SIGKILL in codes
        if codes == {0}:
            # The machine was fast enough to finish it: the next kills are those of another run.
            found.append(tmp_path / str(len(found)))
            steps = [0]
        if (checkpoint := latest_checkpoint(found[-1])) is not None:
            step = load_run(checkpoint)["run"]["step"]
            # No kill lost a checkpoint that was whole before it.
            assert steps[-1] <= step
            assert load_process(checkpoint, world_size - 1)["source"] == {"position": step}
            steps.append(step)
    run(found[-1], 1)
    for out in found:
        if world_size == 1:
            assert (out / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()
        same_weights(out, whole)


def same_weights(out: Path, whole: Path) -> None:
    """To sums of steps in another order."""
    single = load_sae_folder(whole)
    for name, value in load_sae_folder(out).named_parameters():
        torch.testing.assert_close(value, single.get_parameter(name), atol=2e-4, rtol=1e-3)


def test_full_disk_ends_the_training_with_a_line_and_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """A real one, of a megabyte, which nobody but the process sees."""
    process = forks().Process(target=fleet.run_on_a_full_disk, args=(str(tmp_path),))
    process.start()
    process.join(60)
    if process.exitcode == fleet.MAY_NOT_MOUNT:
        pytest.skip("a tmpfs cannot be mounted here")
    assert process.exitcode == 0
    error, *checkpoints = (tmp_path / "said").read_text().splitlines()
    assert "step_00000006': checkpoint cannot be written: the disk is full (0 MB free); the one before is kept" in error
    assert checkpoints == ["step_00000002", "step_00000004"]
    assert (tmp_path / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()


def test_four_two_one_and_three_processes_go_on_from_each_other(whole: Path, tmp_path: Path) -> None:
    for world_size, stop_after in ((4, 15), (2, 30), (1, 45), (3, None)):
        run(tmp_path, world_size, stop_after)
        if stop_after is not None:
            checkpoint = latest_checkpoint(tmp_path)
            assert checkpoint is not None
            assert checkpoint.name == f"step_{stop_after:08d}"
            assert len(list(checkpoint.glob("*.distcp"))) == world_size
    same_weights(tmp_path, whole)
    # Every token of every step was trained on once, by one process.
    assert fleet.seen(tmp_path) == list(range(60 * 120)) == fleet.seen(whole)


def test_launcher_restarts_processes_when_one_is_killed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As scripts/launch_slurm.sh does: a meeting place that outlives a restart keeps the addresses of those that died.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    marker = tmp_path / "was-killed"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="restarts",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="forkserver",
    )
    restarts = elastic_launch(config, fleet.run_once_killed)(str(tmp_path / "out"), str(marker))
    assert marker.exists()
    assert restarts == {0: 1, 1: 1}
    same_weights(tmp_path / "out", whole)
