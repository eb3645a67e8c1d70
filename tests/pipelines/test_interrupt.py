"""Ctrl-C and kill at any stage: what is done stays, the same command goes on, and the result is the same."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SLOWER = ["cache.num_tokens=8192", "train.topk.training.num_tokens=32768", "train.jumprelu.training.num_tokens=32768"]


def start(recipe: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "saekit_pipelines", "run", str(recipe), *SLOWER],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for(process: "subprocess.Popen[str]", path: Path, pattern: str) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(path.glob(pattern)):
            return True
        time.sleep(0.02)
    return False


def weights(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("train/*/sae.safetensors"))
    }


def test_kills_and_interrupts_change_nothing_in_the_result(recipe_file: Path) -> None:
    run = recipe_file.parent / "run"
    for stop, folder, pattern in [
        (signal.SIGKILL, run / "cache" / "hooks", "*/shard-00001*"),
        (signal.SIGINT, run / "train" / "topk", "checkpoints/step_*"),
        (signal.SIGKILL, run / "train" / "jumprelu", "checkpoints/step_*"),
        (signal.SIGINT, run / "label" / "topk", "*"),
    ]:
        process = start(recipe_file)
        reached = wait_for(process, folder, pattern)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=120)
        assert reached, errors
        if stop == signal.SIGINT:
            assert process.returncode == 130
            assert "run the same command again to resume" in errors
        else:
            assert process.returncode == -signal.SIGKILL
    process = start(recipe_file)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert (run / "report" / "index.html").is_file()

    resumed = weights(run)
    run.rename(run.with_name("interrupted"))
    process = start(recipe_file)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert weights(run) == resumed
    assert len(resumed) == 2
