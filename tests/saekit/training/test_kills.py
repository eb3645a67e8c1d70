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


def test_twenty_kills_leave_whole_checkpoints_and_change_no_bit(whole: Path, tmp_path: Path) -> None:
    chance, out, kills, steps = random.Random(6), tmp_path / "out", 0, []
    while kills < 20:
        started = tmp_path / f"started_{kills}"
        process = forks().Process(target=fleet.run_until_killed, args=(str(out), str(started)))
        process.start()
        while process.is_alive() and not started.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.06))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            break  # the machine was fast enough to finish
        kills += 1
        if (checkpoint := latest_checkpoint(out)) is not None:
            steps.append(load_run(checkpoint)["run"]["step"])
            assert load_process(checkpoint, 0)["source"] == {"position": steps[-1]}
    assert kills
    # No kill lost a checkpoint that was whole before it.
    assert steps == sorted(steps)
    run(out, 1)
    assert (out / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()


def test_four_two_one_and_three_processes_go_on_from_each_other(whole: Path, tmp_path: Path) -> None:
    for world_size, stop_after in ((4, 15), (2, 30), (1, 45), (3, None)):
        run(tmp_path, world_size, stop_after)
        if stop_after is not None:
            checkpoint = latest_checkpoint(tmp_path)
            assert checkpoint is not None
            assert checkpoint.name == f"step_{stop_after:08d}"
            assert len(list(checkpoint.glob("*.distcp"))) == world_size
    found, single = load_sae_folder(tmp_path), load_sae_folder(whole)
    for name, value in found.named_parameters():
        torch.testing.assert_close(value, single.get_parameter(name), atol=2e-4, rtol=1e-3)
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
    found, single = load_sae_folder(tmp_path / "out"), load_sae_folder(whole)
    for name, value in found.named_parameters():
        torch.testing.assert_close(value, single.get_parameter(name), atol=2e-4, rtol=1e-3)
