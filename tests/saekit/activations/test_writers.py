"""Several processes write the bytes that one writes, and what stops one of them leaves what the same command goes on from."""

import errno
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from saekit.activations import CacheConfig, cache_activations, writer
from saekit.activations.collect import ShardWriter
from saekit.activations.writer import Shard
from saekit.manifest import manifest_sha256
from saekit.models import LanguageModel
from tests.saekit.training.ranks import forks, free_port, join

MakeConfig = Callable[..., CacheConfig]
Tree = Callable[[Path], dict[str, bytes]]
HOOK_POINTS = ["model.layers.1", "model.layers.0:input"]


def write_caches(rank: int, world_size: int, port: int, config: CacheConfig, out: Path) -> None:
    """Writes three caches: one whole, one on a disk that is full for rank 0, and one in which rank 1 is killed before its first shard."""
    join(rank, world_size, port)
    cache_activations(config, out / "whole")
    submit, write = ShardWriter.submit, writer.write_shard_file

    def fill(*args: object, **settings: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    def kill(self: ShardWriter, shards: list[Shard]) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        submit(self, shards)

    if rank == 0:
        writer.write_shard_file = fill  # type: ignore[assignment]  # in this process alone
    stopped(config, out / "full", out / f"full_{rank}.txt")
    writer.write_shard_file = write
    ShardWriter.submit = kill  # type: ignore[method-assign, assignment]  # in this process alone
    stopped(config, out / "killed", out / f"killed_{rank}.txt")
    # No clean-up of gloo's threads: the others are gone.
    os._exit(0)


def stopped(config: CacheConfig, cache: Path, message: Path) -> None:
    """Writes a cache that cannot be finished, and what it says about that."""
    try:
        cache_activations(config, cache)
    except OSError as error:
        message.write_text(str(error), encoding="utf-8")


@pytest.fixture(scope="module")
def running(
    make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Path, list[ForkServerProcess]]]:
    """Number of processes -> their folder and the processes, all at work."""
    found = {}
    for world_size in (2, 3):
        out, port = tmp_path_factory.mktemp(f"writers{world_size}"), free_port()
        settings = {"dtype": "int8", "compression": "lz4"} if world_size == 3 else {}
        config = make_config(hook_points=HOOK_POINTS, **settings)
        processes = [
            forks().Process(target=write_caches, args=(rank, world_size, port, config, out))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        found[world_size] = out, processes
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_store_written_by_several_processes_is_that_of_one(
    world_size: int,
    running: dict[int, tuple[Path, list[ForkServerProcess]]],
    make_config: MakeConfig,
    cached: Path,
    lm: LanguageModel,
    tmp_path: Path,
    tree_of: Tree,
) -> None:
    out, processes = running[world_size]
    config, alone = make_config(hook_points=HOOK_POINTS), cached
    if world_size == 3:
        config = make_config(hook_points=HOOK_POINTS, dtype="int8", compression="lz4")
        alone = cache_activations(config, tmp_path / "alone", lm=lm).path
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, 0][:world_size]
    assert tree_of(out / "whole") == tree_of(alone)
    assert manifest_sha256(out / "whole") == manifest_sha256(alone)
    for rank in range(world_size):
        full = (out / f"full_{rank}.txt").read_text(encoding="utf-8")
        assert "No space left on device; what is finished stays: run the same command again" in full
        if rank != 1:
            assert "another of its processes has ended" in (out / f"killed_{rank}.txt").read_text(encoding="utf-8")
    for name in ("full", "killed"):
        left = {path: path.stat().st_mtime_ns for path in (out / name).rglob("shard-*.json")}
        # Two hook points of four shards: those of the other processes are there.
        assert 0 < len(left) < 8
        assert not list((out / name).rglob(".shard-*.tmp"))
        cache_activations(config, out / name, lm=lm)
        assert {path: path.stat().st_mtime_ns for path in left} == left
        assert tree_of(out / name) == tree_of(alone)
