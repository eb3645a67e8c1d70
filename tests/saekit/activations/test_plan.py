"""The preflight: sizes that come true, and a disk that cannot hold them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from saekit.activations import CacheConfig, CachePlan, cache_activations, plan_cache
from saekit.errors import DataError, HookPointError, ResourceError
from saekit.models import LanguageModel

MakeConfig = Callable[..., CacheConfig]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_plan_counts_rows_shards_and_bytes(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    config = make_config(hook_points=["model.layers.1", "model.layers.0.mlp.up_proj"], num_tokens=1590)
    plan = plan_cache(config, tmp_path / "not" / "there", lm=lm)
    assert (plan.num_tokens, plan.num_rows, plan.num_shards) == (1600, 100, 4)
    assert plan.widths == {"model.layers.1": 32, "model.layers.0.mlp.up_proj": 64}
    assert plan.size_bytes == 1600 * (9 + 2 * 32 + 10 + 2 * 64 + 10)
    assert plan.seconds == pytest.approx(1600 / plan.tokens_per_second)
    assert not (tmp_path / "not").exists()


def test_planned_bytes_hold_what_is_written(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    config = make_config(shard_tokens=2**20, dtype="float32")
    plan = plan_cache(config, tmp_path, lm=lm)
    store = cache_activations(config, tmp_path / "cache", lm=lm)
    arrays = sum(
        file.stat().st_size
        for file in store.path.rglob("*")
        if file.is_file() and not file.name.endswith(("json", "jsonl"))
    )
    assert 0.9 * plan.size_bytes < arrays <= plan.size_bytes


def test_plan_is_said_once_before_the_start(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path, recorder: Any
) -> None:
    cache_activations(make_config(), tmp_path / "cache", lm=lm, progress=recorder)
    assert recorder.said[0].startswith(
        "caching 1,600 tokens in 100 rows at model.layers.1 (width 32): 0.1 MB in 4 shards"
    )
    cache_activations(make_config(), tmp_path / "cache", lm=lm, progress=recorder)
    assert sum(line.startswith("caching") for line in recorder.said) == 1


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk with 100 KB free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**5, 10**5))
    return


@pytest.mark.usefixtures("small_disk")
def test_disk_that_cannot_hold_it_is_refused_and_nothing_is_written(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=r"0\.1 MB free on that disk, needs .* for 1,600 tokens"):
        cache_activations(make_config(), tmp_path / "cache", lm=lm)
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("small_disk")
def test_compressed_cache_is_begun_where_its_greatest_size_does_not_fit(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    config = make_config(dtype="int8", compression="zstd", num_tokens=10_000)
    plan = plan_cache(config, tmp_path, lm=lm)
    assert plan.size_bytes > plan.free_bytes
    assert ": at most 0.6 MB in" in plan.summary()


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"hook_points": ["model.layers.9"]}, HookPointError),
        ({"tokens": {"context_len": 128}}, DataError),
        ({"text": {"kind": "files", "paths": ["/nowhere/*.txt"]}}, DataError),
    ],
    ids=["hook-point", "context", "text"],
)
def test_plan_refuses_what_cannot_run(
    changes: dict[str, object], error: type[Exception], make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(error):
        plan_cache(make_config(**changes), tmp_path, lm=lm)


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "1 s"), (89.0, "89 s"), (600.0, "10 min"), (10_000.0, "2.8 h")], ids=str
)
def test_summary_tells_the_time_in_words(seconds: float, text: str) -> None:
    plan = CachePlan(
        num_tokens=1000,
        num_rows=10,
        num_shards=1,
        widths={"h": 8},
        size_bytes=1,
        free_bytes=2,
        tokens_per_second=1000 / seconds,
    )
    assert f"about {text} at" in plan.summary()


@pytest.mark.parametrize(
    "shard_tokens, batch_size, rows", [(512, 8, 32), (500, 8, 24), (80, 8, 5), (1, 8, 1), (160, 3, 9)], ids=str
)
def test_shards_hold_whole_forwards(shard_tokens: int, batch_size: int, rows: int, make_config: MakeConfig) -> None:
    assert make_config(shard_tokens=shard_tokens, batch_size=batch_size).shard_rows == rows
