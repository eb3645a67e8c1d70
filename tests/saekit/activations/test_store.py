"""Opening, reading and splitting a cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit.activations import NORMAL, SPECIAL, ActivationStore, StoreView, cache_activations
from saekit.errors import ConfigError, StoreError
from saekit.manifest import Manifest, manifest_sha256, read_manifest, write_manifest
from saekit.models import LanguageModel, load_model


def test_open_tells_what_the_cache_holds(cached: Path, lm: LanguageModel) -> None:
    store = ActivationStore.open(cached, "model.layers.0:input")
    assert store.hook_points == ("model.layers.1", "model.layers.0:input")
    assert (store.d_in, store.num_rows, store.context_len, store.num_tokens) == (32, 100, 16, 1600)
    assert store.dtype == "bfloat16"
    assert store.model_fingerprint == lm.fingerprint
    assert store.model_name == lm.name
    assert store.sha256 == manifest_sha256(cached)
    assert store.tokens().shape == store.documents().shape == store.kinds().shape == store.norms().shape == (100, 16)


@pytest.mark.parametrize(
    "hook_point, message",
    [
        (None, r"holds model\.layers\.1, model\.layers\.0:input; name one"),
        ("model.layers.2", r"no activations of 'model\.layers\.2', it holds model\.layers\.1, model\.layers\.0:input"),
    ],
    ids=["none-named", "not-there"],
)
def test_hook_points_that_are_there_are_listed(hook_point: str | None, message: str, cached: Path) -> None:
    with pytest.raises(StoreError, match=message):
        ActivationStore.open(cached, hook_point)


def test_output_may_be_named(cached: Path) -> None:
    assert ActivationStore.open(cached, "model.layers.1:output").hook_point == "model.layers.1"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no cache there"):
        ActivationStore.open(tmp_path)
    values = {"stage": "train", "status": "complete", "config": {}, "config_sha256": "0", "started": "now"}
    write_manifest(tmp_path, Manifest.parse(values))
    with pytest.raises(StoreError, match="no cache there"):
        ActivationStore.open(tmp_path)


def test_unfinished_cache_is_refused(copied: Path) -> None:
    manifest = read_manifest(copied)
    assert manifest is not None
    write_manifest(copied, manifest.model_copy(update={"status": "running"}))
    with pytest.raises(StoreError, match="not finished; run the cache command again to go on"):
        ActivationStore.open(copied, "model.layers.1")


def test_another_model_is_refused(store: ActivationStore, lm: LanguageModel) -> None:
    store.check_model(lm)
    other = load_model(lm.name)
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-3
    with pytest.raises(StoreError, match=r"written by .* with fingerprint"):
        store.check_model(other)


def test_reads_agree_in_any_order(store: ActivationStore) -> None:
    rng = np.random.default_rng(0)
    whole = store.read_rows(range(store.num_rows))
    rows = rng.permutation(store.num_rows)[:37]
    assert torch.equal(store.read_rows(rows), whole[torch.from_numpy(rows)])
    for size in (1, 50, 1600):
        flat = rng.integers(0, store.num_tokens, size)
        assert torch.equal(store.read_tokens(flat), whole.flatten(0, 1)[torch.from_numpy(flat)])
    assert store.read_tokens([]).shape == (0, 32)
    assert store.read_rows([]).shape == (0, 16, 32)


@pytest.mark.parametrize("place", [-1, 1600])
def test_tokens_outside_are_refused(place: int, store: ActivationStore) -> None:
    with pytest.raises(StoreError, match=f"token {place}: outside the cache, needs 0 to 1599"):
        store.read_tokens([0, place])
    with pytest.raises(StoreError, match="row 100: outside the cache"):
        store.read_rows([100])


def test_reads_do_not_depend_on_the_chunks(
    lm: LanguageModel, make_config: Any, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three tokens a chunk, two of the 32 columns' bytes each; the last of a row is filled up.
    monkeypatch.setattr("saekit.activations.chunks._CHUNK_BYTES", 3 * 32 * 2)
    monkeypatch.setattr("saekit.activations.chunks._LEAST_CHUNK_BYTES", 1)
    chunked = cache_activations(make_config(), tmp_path / "cache", lm=lm)
    assert set(np.diff(chunked.chunk_bounds).tolist()) == {3, 1}
    rows = np.random.default_rng(0).permutation(100)
    assert torch.equal(chunked.read_rows(rows), store.read_rows(rows))
    flat = np.random.default_rng(1).permutation(1600)[:333]
    assert torch.equal(chunked.read_tokens(flat), store.read_tokens(flat))
    monkeypatch.setattr("saekit.activations.reader._BLOCK_CHUNKS", 5)
    assert torch.equal(chunked.read_tokens(flat), store.read_tokens(flat))


def test_shards_are_plain_zarr_for_other_readers(store: ActivationStore) -> None:
    import zarr

    shard = zarr.open_group(store.path / "hooks/model.layers.1/shard-00001.zarr", mode="r")
    bits = shard["activations"]
    assert bits.attrs["dtype"] == "bfloat16"
    assert torch.equal(torch.from_numpy(bits[...]).view(torch.bfloat16), store.read_rows(range(32, 64)))


def test_view_reads_its_tokens_in_order(store: ActivationStore) -> None:
    view = store.view()
    assert np.array_equal(view.mask, store.kinds() == NORMAL)
    batches = list(view.iter_batches(100))
    assert [len(x) for x, _ in batches[:-1]] == [100] * (len(batches) - 1)
    assert np.array_equal(np.concatenate([flat for _, flat in batches]), view.indices)
    read = torch.cat([x for x, _ in batches])
    assert read.dtype == torch.float32
    assert torch.equal(read, store.read_tokens(view.indices).float())
    assert np.array_equal(view.rows(), np.unique(view.indices // store.context_len))
    assert np.array_equal(view.documents, np.unique(store.documents().ravel()[view.indices]))
    special = view.of_kind(SPECIAL)
    assert np.array_equal(special.mask, (store.kinds() == SPECIAL) & np.isin(store.documents(), view.documents))


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_split_shares_no_text(fraction: float, seed: int, store: ActivationStore) -> None:
    train, test = store.split(fraction, seed=seed)
    keys = store.document_keys()
    assert not np.intersect1d(keys[train.documents], keys[test.documents]).size
    assert not np.any(train.mask & test.mask)
    assert np.array_equal(train.mask | test.mask, store.kinds() == NORMAL)
    sizes = np.bincount(store.documents()[store.kinds() == NORMAL])
    total = store.view().num_tokens
    assert abs(test.num_tokens - fraction * total) <= sizes.max()
    assert min(train.num_tokens, test.num_tokens) > 0


def test_split_is_the_same_in_every_process_and_differs_by_seed(store: ActivationStore) -> None:
    def sides(view: StoreView) -> list[int]:
        return view.documents.tolist()

    again = ActivationStore.open(store.path, store.hook_point)
    assert sides(store.split(0.2)[1]) == sides(again.split(0.2)[1])
    assert sides(store.split(0.2)[1]) != sides(store.split(0.2, seed=1)[1])


def test_split_keeps_equal_texts_together(store: ActivationStore) -> None:
    keys = store.document_keys().tolist()
    twins = [number for number, key in enumerate(keys) if keys.count(key) == 2]
    assert twins == [30, 40] or not twins
    for seed in range(20):
        train, test = store.split(0.5, seed=seed)
        assert sum(len(np.intersect1d(twins, view.documents)) in (0, len(twins)) for view in (train, test)) == 2


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_split_needs_a_fraction(fraction: float, store: ActivationStore) -> None:
    with pytest.raises(ConfigError, match="needs a number between 0 and 1"):
        store.split(fraction)


def test_split_needs_two_documents(lm: LanguageModel, make_config: Any, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "' + "the river rose and fell " * 20 + '"}\n', encoding="utf-8")
    config = make_config(text={"kind": "files", "paths": [str(path)]}, num_tokens=32)
    store = cache_activations(config, tmp_path / "cache", lm=lm)
    with pytest.raises(StoreError, match="a split needs at least 2"):
        store.split()


@pytest.mark.parametrize(
    "sizes, fraction, places",
    [
        ([10, 90, 2, 1, 50], 0.1, [0, 2, 3]),
        ([90, 90, 90], 0.1, [0]),
        ([10, 10], 0.9, [0]),
        ([5, 100, 100], 0.01, [0]),
        ([1] * 100, 0.05, [0, 1, 2, 3, 4]),
    ],
    ids=["skips-long", "all-too-long", "keeps-one", "smallest", "even"],
)
def test_split_takes_what_brings_it_nearer(sizes: list[int], fraction: float, places: list[int]) -> None:
    from saekit.activations.view import _nearest_sum

    assert _nearest_sum(np.array(sizes, np.float64), fraction) == places
