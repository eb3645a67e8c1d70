"""Rings: the budget and what fits it, the text gone through again and again, segments made anew, batches on any world size."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.activations import ActivationStore, CacheConfig, Ring, RingConfig, cache_activations, plan_ring
from saekit.activations.filler import FillerJob
from saekit.activations.fillers import FAILED_NAME, RingKeeper, Watcher, clear_ring
from saekit.activations.ring import HeldOut, Place
from saekit.activations.ringbatches import RingBatches
from saekit.activations.segment import make_segment, open_segment, read_ledger
from saekit.activations.walk import TextWalk
from saekit.activations.writers import ALONE
from saekit.errors import ConfigError, DataError, ResourceError, StoreError
from saekit.manifest import read_manifest
from saekit.models import LanguageModel
from saekit.models.hooks import capture
from saekit.models.texts import iter_documents
from saekit.models.tokens import TokenConfig
from tests.saekit.activations.rings import NoFillers, ThreadFillers, make_ring, size_of

HOOKS = ("model.layers.1", "model.layers.0:input")
PLACES = (HOOKS[:1], HOOKS[1:])


@pytest.fixture(scope="module")
def kept(cached: Path) -> list[ActivationStore]:
    return [ActivationStore.open(cached, name) for name in HOOKS]


def thresholds(kept: list[ActivationStore]) -> dict[str, float]:
    return {store.hook_point: store.statistics.massive_threshold for store in kept}


def walk_of(ring: Ring, lm: LanguageModel) -> TextWalk:
    return TextWalk(ring.cache.text, lm.tokenizer, ring.cache.tokens, held_out=ring.held_out())


@pytest.fixture(scope="module")
def filled(
    cached: Path, kept: list[ActivationStore], lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Ring:
    """A ring whose first two segments are there; not to be changed."""
    ring = make_ring(cached, tmp_path_factory.mktemp("filled") / "ring", places=PLACES)
    walk = walk_of(ring, lm)
    for number in range(2):
        make_segment(ring, number, lm, walk, ALONE, thresholds(kept))
    return ring


def batches_of(ring: Ring, kept: list[ActivationStore], **changes: object) -> RingBatches:
    options = {"batch_size": 24, "num_tokens": 10**6, "seed": 3} | changes
    return RingBatches(ring, kept, NoFillers(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("100GB", 100 * 10**9), ("1.5 TB", 15 * 10**11), ("64MiB", 64 * 2**20), (4096, 4096), ("12_000", 12_000)],
)
def test_disk_is_a_size_with_or_without_unit(text: object, size: int) -> None:
    assert RingConfig.parse({"disk": text}).disk == size


@pytest.mark.parametrize("text", ["100k", "GB", "-1GB", "", True, 1.5])
def test_disk_that_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"disk: found"):
        RingConfig.parse({"disk": text})


@pytest.mark.parametrize("batch_size", [32, 700])
def test_budget_that_is_too_small_is_refused_with_the_least_that_works(
    cached: Path, batch_size: int, tmp_path: Path
) -> None:
    split = HeldOut(test_fraction=0.2, seed=0, places=PLACES)

    def plan(disk: int) -> Ring:
        return plan_ring(RingConfig(disk=disk), cached, tmp_path, split=split, batch_size=batch_size)

    with pytest.raises(ConfigError, match=r"^ring\.disk: found 1,000 bytes, needs at least [0-9,]+: ") as found:
        plan(1000)
    least = int(str(found.value).split("at least ")[1].split(": ")[0].replace(",", ""))
    assert plan(least).sizes.segment_tokens >= 2 * batch_size
    with pytest.raises(ConfigError, match=f"{least:,}"):
        plan(least - 2)


def test_ring_without_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no cache in"):
        plan_ring(
            RingConfig(disk=10**9),
            tmp_path,
            tmp_path / "ring",
            split=HeldOut(test_fraction=0.1, seed=0, places=PLACES),
            batch_size=8,
        )


@pytest.mark.parametrize("form", [{"dtype": "int8", "compression": "zstd"}, {"compression": "lz4"}])
def test_compressed_segments_take_no_more_than_said(
    form: dict[str, str], make_config: Callable[..., CacheConfig], lm: LanguageModel, tmp_path: Path
) -> None:
    store = cache_activations(make_config(num_tokens=320, **form), tmp_path / "cache", lm=lm)
    ring = make_ring(tmp_path / "cache", tmp_path / "ring", places=PLACES[:1])
    make_segment(ring, 0, lm, walk_of(ring, lm), ALONE, thresholds([store]))
    assert size_of(ring.segment_folder(0)) <= ring.sizes.segment_bytes


def test_walk_gives_each_document_once_a_pass_without_those_held_out(
    make_config: Callable[..., CacheConfig], lm: LanguageModel
) -> None:
    text = make_config().text
    held_out = frozenset({_key(text, 7), _key(text, 30)})
    config = TokenConfig(context_len=16, packing="per_document")
    walk = TextWalk(text, lm.tokenizer, config, held_out=held_out)
    place, passes = Place(0, 0), []
    seen: dict[int, list[int]] = {0: [], 1: []}
    while place.passes < 2:
        table, begin, place = walk.draw(place, 20)
        passes.append(begin.passes)
        again, *places = TextWalk(text, lm.tokenizer, config, held_out=held_out).draw(begin, 20)
        assert np.array_equal(again.tokens, table.tokens)
        assert places == [begin, place]
        if begin.passes > 1:
            break
        seen[begin.passes] += np.unique(table.documents[table.documents >= 0]).tolist()
    # Document 5 is empty, 40 is the text of 30.
    assert seen[0] == seen[1] == [number for number in range(48) if number not in {5, 7, 30, 40}]
    assert passes == sorted(passes)


def _key(text: object, number: int) -> int:
    document = next(itertools.islice(iter_documents(text), number, None))  # type: ignore[arg-type]
    return int(hashlib.sha256(document.text.encode()).hexdigest()[:16], 16)


def test_text_that_fills_no_row_is_refused(make_config: Callable[..., CacheConfig], lm: LanguageModel) -> None:
    walk = TextWalk(make_config().text, lm.tokenizer, TokenConfig(context_len=60_000))
    with pytest.raises(DataError, match="needs at least"):
        walk.draw(Place(0, 0), 4)


def test_segments_hold_what_the_model_says_and_nothing_that_is_held_out(
    filled: Ring, kept: list[ActivationStore], lm: LanguageModel
) -> None:
    held_out = filled.held_out()
    keys = kept[0].document_keys()
    view, entry = open_segment(filled, 0, kept)
    documents = view.store.documents()
    assert not held_out & {int(keys[d]) for d in np.unique(documents) if 0 <= d < len(keys)}
    assert held_out <= set(keys.tolist())
    hidden = capture(lm, torch.from_numpy(view.store.tokens()[8:16]).long(), HOOKS)
    for part in view.store.parts:
        assert torch.equal(part.read_rows(np.arange(8, 16)), hidden[part.hook_point].to(torch.bfloat16))
    assert entry.num_tokens == view.num_tokens
    assert size_of(filled.segment_folder(0)) <= filled.sizes.segment_bytes


def test_batches_give_each_token_once_segment_after_segment(filled: Ring, kept: list[ActivationStore]) -> None:
    with batches_of(filled, kept) as batches:
        for number in range(2):
            view, _ = open_segment(filled, number, kept)
            given = []
            while batches.segment == number:
                given.append(batches.next_batch())
            assert len(given) == view.num_tokens // 24
            left = {row.tobytes(): 0 for row in view.read(view.indices).numpy()}
            rows = view.read(view.indices).numpy()
            for row in rows:
                left[row.tobytes()] += 1
            for row in torch.cat(given).numpy():
                left[row.tobytes()] -= 1
            assert min(left.values()) == 0
            assert sum(left.values()) == view.num_tokens % 24
            assert not torch.equal(torch.cat(given)[:24], torch.from_numpy(rows[:24]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_global_batches_are_the_same_for_every_world_size(
    world_size: int, filled: Ring, kept: list[ActivationStore]
) -> None:
    with batches_of(filled, kept) as alone:
        ranks = [
            batches_of(filled, kept, batch_size=24 // world_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        while alone.segment < 2:
            assert torch.equal(alone.next_batch(), torch.cat([rank.next_batch() for rank in ranks]))
        for rank in ranks:
            assert rank.state_dict() == alone.state_dict()
            rank.close()


def test_state_goes_on_exactly_also_between_segments(filled: Ring, kept: list[ActivationStore]) -> None:
    states, given = [], []
    with batches_of(filled, kept) as batches:
        while batches.segment < 2:
            states.append(json.loads(json.dumps(batches.state_dict())))
            given.append(batches.next_batch())
    boundary = next(place for place, state in enumerate(states) if state["segment"] == 1)
    for place in (0, 1, boundary - 1, boundary, len(states) - 1):
        with batches_of(filled, kept) as again:
            again.load_state_dict(states[place])
            for expected in given[place : place + 3]:
                assert torch.equal(again.next_batch(), expected)


@pytest.mark.parametrize("changes", [{"seed": 4}, {"batch_size": 12}, {"memory_bytes": 1e5}])
def test_state_of_another_source_is_refused(
    changes: dict[str, object], filled: Ring, kept: list[ActivationStore]
) -> None:
    with (
        batches_of(filled, kept) as batches,
        batches_of(filled, kept, **changes) as other,
        pytest.raises(StoreError, match=r"^ring: saved with"),
    ):
        other.load_state_dict(batches.state_dict())


def test_order_does_not_depend_on_which_hook_points_are_read(filled: Ring, kept: list[ActivationStore]) -> None:
    # Windows of a few tokens, in which it would show.
    options = {"memory_bytes": 40_000}
    width = kept[0].d_in
    with batches_of(filled, kept, **options) as both, batches_of(filled, kept[:1], **options) as one:
        for _ in range(8):
            assert torch.equal(both.next_batch()[:, :width], one.next_batch())


@pytest.mark.parametrize("lost", ["everything", "end", "shard"])
def test_segment_that_was_not_ended_is_made_anew_to_the_same_bytes(
    lost: str,
    filled: Ring,
    kept: list[ActivationStore],
    lm: LanguageModel,
    tree_of: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    ring = make_ring(filled.kept, Path(shutil.copytree(filled.folder, tmp_path / "ring")), places=PLACES)
    assert ring.identity == filled.identity
    folder, before = ring.segment_folder(1), tree_of(ring.segment_folder(1))
    ring.record_path(1).unlink()
    if lost == "everything":
        shutil.rmtree(folder)
    elif lost == "shard":
        shard = folder / "hooks" / HOOKS[0]
        (shard / "shard-00000.json").unlink()
        (shard / ".shard-00000.zarr.tmp").mkdir()
        (shard / "shard-00000.zarr" / "activations" / "c" / "0" / "0" / "0").write_bytes(b"half")
    make_segment(ring, 1, lm, walk_of(ring, lm), ALONE, thresholds(kept))
    assert tree_of(folder) == before
    assert read_ledger(ring) == read_ledger(filled)


def test_broken_segment_is_named(filled: Ring, kept: list[ActivationStore], tmp_path: Path) -> None:
    ring = make_ring(filled.kept, Path(shutil.copytree(filled.folder, tmp_path / "ring")), places=PLACES)
    shutil.rmtree(ring.segment_folder(1) / "hooks" / HOOKS[0] / "shard-00000.zarr")
    with pytest.raises(StoreError, match=r"^ring: segment 1: .* is missing; remove '.*segment-00001' and run the same"):
        open_segment(ring, 1, kept)


def test_disk_stays_within_the_budget_while_the_text_is_gone_through_twice(
    cached: Path, kept: list[ActivationStore], lm: LanguageModel, tmp_path: Path
) -> None:
    ring = make_ring(cached, tmp_path / "ring", shards=3, places=PLACES)
    RingKeeper(ring).close()
    fillers, said = ThreadFillers(ring, lm), []
    with contextlib.closing(fillers), batches_of(ring, kept, batch_size=48) as batches:
        batches._fillers, batches._num_tokens, batches._say = fillers, 48 * 110, said.append
        for _ in range(110):
            before = batches.segment
            batches.next_batch()
            if batches.segment > before:
                # As after a checkpoint.
                fillers.release(batches.segment)
        # The last segment may still be in the making.
        fillers.threads[0].join(0.1)
    assert fillers.error is None
    assert fillers.most_segments == 2
    assert ring.sizes.kept_bytes + ring.sizes.segment_bytes < fillers.most_bytes <= ring.config.disk
    assert any("documents" in line for line in said)
    assert sum("first document again" in line for line in said) >= 1
    # Not one segment more than was wanted.
    segments = read_ledger(ring).segments
    taken = [segment.num_tokens // 48 for segment in segments]
    assert sum(taken[:-1]) < 110 <= sum(taken)
    clear_ring(ring)
    assert not list(ring.folder.glob("*segment*"))


def test_batches_that_no_segment_can_hold_are_refused(cached: Path, lm: LanguageModel, tmp_path: Path) -> None:
    ring = make_ring(cached, tmp_path / "ring", shards=6, places=PLACES)
    fillers = ThreadFillers(ring, lm)
    fillers.start(job_of(ring, batch_size=10_000))
    # As is said of segments without a batch.
    fillers.release(100)
    fillers.threads[0].join()
    fillers.close()
    with pytest.raises(DataError, match="holds a batch of 10,000"):
        fillers.check()


def job_of(ring: Ring, *, batch_size: int = 32) -> FillerJob:
    return FillerJob(
        kept=str(ring.kept),
        folder=str(ring.folder),
        ring=ring.config,
        split=ring.split,
        identity=ring.identity,
        batch_size=batch_size,
        num_tokens=10**6,
        start=0,
    )


def test_end_of_the_filling_process_is_told_to_all_with_its_reason(filled: Ring, tmp_path: Path) -> None:
    ring = make_ring(filled.kept, tmp_path / "ring", places=PLACES)
    keeper, watcher = RingKeeper(ring), Watcher(ring)
    watcher.check()
    with pytest.raises(ResourceError, match="another process is writing there"):
        RingKeeper(ring)
    keeper.start(job_of(ring).model_copy(update={"kept": str(tmp_path / "gone")}))
    keeper._running[0].wait(120)
    with pytest.raises(ResourceError, match=r"the process that fills it ended with 2: ring: no cache in '.*gone'"):
        keeper.check()
    with pytest.raises(ResourceError, match=r"no cache in '.*gone'"):
        watcher.check()
    keeper.close()
    (ring.folder / FAILED_NAME).unlink()
    with pytest.raises(ResourceError, match="the first process of the training has ended"):
        watcher.check()


def test_ring_of_another_budget_is_refused_by_name(filled: Ring, tmp_path: Path) -> None:
    ring = make_ring(filled.kept, tmp_path / "ring", places=PLACES)
    RingKeeper(ring).close()
    manifest = read_manifest(ring.folder)
    assert manifest is not None
    assert manifest.stage == "ring"
    with pytest.raises(ConfigError, match=r"ring\.disk \([0-9]+ there, [0-9]+ asked\), segment_rows \(32 there, 64"):
        RingKeeper(make_ring(filled.kept, ring.folder, shards=2, places=PLACES))
