"""Several processes write the bytes that one writes, and one that is killed leaves what the same command goes on from."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from saekit.activations import CacheConfig, cache_activations
from saekit.manifest import manifest_sha256, write_json
from saekit.models import LanguageModel

MakeConfig = Callable[..., CacheConfig]
Tree = Callable[[Path], dict[str, bytes]]
HOOK_POINTS = ["model.layers.1", "model.layers.0:input"]

# Writes caches one after another; in the last one the process with rank 1 is killed before its first shard.
SCRIPT = """
import json, os, signal, sys
import torch
from saekit.activations import CacheConfig, cache_activations, collect

torch.set_num_threads(1)
config = CacheConfig.parse(json.load(open(sys.argv[1])))
cache_activations(config, sys.argv[2])
submit, calls = collect.ShardWriter.submit, []

def kill(self, shards):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    submit(self, shards)

collect.ShardWriter.submit = kill
try:
    cache_activations(config, sys.argv[3])
except OSError as error:
    sys.exit(str(error))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.mark.parametrize("world_size", [2, 3])
def test_store_written_by_several_processes_is_that_of_one(
    world_size: int, make_config: MakeConfig, cached: Path, lm: LanguageModel, tmp_path: Path, tree_of: Tree
) -> None:
    root, port = Path(__file__).parents[3], free_port()
    config = make_config(hook_points=HOOK_POINTS)
    write_json(tmp_path / "config.json", config.to_dict())
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "config.json"), str(tmp_path / "a"), str(tmp_path / "b")]
    running = []
    for rank in range(world_size):
        environment = os.environ | {
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        ended = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for rank, (process, errors) in enumerate(zip(running, ended, strict=True)):
        assert process.returncode == (-signal.SIGKILL if rank == 1 else 1), errors
        assert rank == 1 or "another of its processes has ended" in errors
    assert tree_of(tmp_path / "a") == tree_of(cached)
    assert manifest_sha256(tmp_path / "a") == manifest_sha256(cached)
    left = {path.name for path in (tmp_path / "b").rglob("shard-*.json")}
    assert 0 < len(left) < 4
    cache_activations(config, tmp_path / "b", lm=lm)
    assert tree_of(tmp_path / "b") == tree_of(cached)
