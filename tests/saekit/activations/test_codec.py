"""Codecs: what is stored is what comes back, and quantised tokens keep the error that their scale allows."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import zarr

from saekit.activations import CacheConfig, cache_activations, verify_store
from saekit.activations.chunks import chunk_bounds, chunk_shape, shard_mark
from saekit.activations.codec import CODECS, token_bytes
from saekit.activations.shardfile import Compression, ShardFile, write_shard_file
from saekit.errors import NonFiniteError, ResourceError, StoreError
from saekit.models import LanguageModel, replace

MakeConfig = Callable[..., CacheConfig]
COMPRESSIONS = get_args(Compression)


@pytest.mark.parametrize("name", ["int8", "float8_e4m3"])
def test_quantised_numbers_are_near_and_massive_tokens_survive(name: str) -> None:
    codec, generator = CODECS[name], torch.Generator().manual_seed(0)
    x = torch.randn(64, 33, generator=generator)
    x[3] *= 5000
    x[4, 7] = 3e4
    x[5] = 0
    stored = codec.encode(x)
    assert stored.shape == (64, codec.width(33)) == (64, token_bytes(name, 33))
    found = codec.decode(codec.to_tensor(codec.to_array(stored)))
    largest = x.abs().amax(dim=1, keepdim=True)
    step = largest / 254 if name == "int8" else torch.maximum(x.abs() / 16, largest / 448 * 2**-10)
    assert bool(((found - x).abs() <= step * 1.001).all())
    # Beside one huge dimension int8 has no step left for the others, float8 keeps them.
    others = torch.arange(33) != 7
    assert bool((found[4, others] == 0).all()) == (name == "int8")
    assert torch.equal(found[5], x[5])


def test_float8_decodes_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    stored = torch.cat([codes, torch.tensor([1.0]).view(torch.uint8)])[None]
    assert torch.equal(CODECS["float8_e4m3"].decode(stored)[0], codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("context_len", [16, 150])
def test_shard_file_is_a_zarr_array_and_reads_by_chunk(
    compression: Compression, context_len: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(0).integers(0, 99, (7, context_len, 5)).astype("<u2")
    shape = chunk_shape(context_len, [1024, 512])
    assert shape == {16: (2, 16), 150: (1, 30)}[context_len]
    mark = shard_mark("cache", 3)
    write_shard_file(tmp_path, "activations", array, shape=shape, compression=compression, dtype="bfloat16", mark=mark)
    assert np.array_equal(np.asarray(zarr.open_group(tmp_path)["activations"][...]), array)
    path = tmp_path / "activations" / "c" / "0" / "0" / "0"
    bounds, flat = chunk_bounds(7, context_len, shape), array.reshape(-1, 5)
    options = {"num_chunks": len(bounds) - 1, "chunk_bytes": shape.rows * shape.positions * 10, "item_bytes": 2}
    assert shape.num_chunks(7, context_len) == len(bounds) - 1
    # So few that neighbours are read in several goes.
    monkeypatch.setattr("saekit.activations.shardfile._MAX_BUFFERS", 6)
    file = ShardFile(path, compression=compression, mark=mark, **options)
    for chunks in (np.arange(len(bounds) - 1), np.array([0]), np.array([1, 2])):
        sizes = np.diff(bounds)[chunks]
        out = np.empty((sizes.sum(), 5), array.dtype)
        file.read_chunks(chunks.tolist(), (sizes * 10).tolist(), out.reshape(-1).view(np.uint8))
        assert np.array_equal(out, np.concatenate([flat[bounds[c] : bounds[c + 1]] for c in chunks]))
    with pytest.raises(StoreError, match="belongs to another cache, hook point or place"):
        ShardFile(path, compression=compression, mark=shard_mark("cache", 4), **options)
    damaged = bytearray(path.read_bytes())
    damaged[67] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match="chunk 0 has changed"):
        ShardFile(path, compression=compression, mark=mark, **options).read_chunks([0], [10], np.empty(10, np.uint8))
    path.write_bytes(damaged[:-1])
    with pytest.raises(StoreError, match="its index has changed"):
        ShardFile(path, compression=compression, mark=mark, **options)


def test_too_many_open_files_are_told_from_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match="too many open files, needs a higher 'ulimit -n'"):
        ShardFile(tmp_path, num_chunks=1, chunk_bytes=1, item_bytes=1, compression="none", mark=b"")


@pytest.mark.parametrize(
    ("dtype", "compression"), [("int8", "none"), ("float8_e4m3", "zstd_bitshuffle"), ("float16", "lz4")]
)
def test_cache_of_each_codec_is_whole_and_repaired(
    dtype: str, compression: str, make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    config = make_config(dtype=dtype, compression=compression, num_tokens=800)
    store = cache_activations(config, tmp_path / "cache", lm=lm)
    plain = cache_activations(make_config(dtype="float32", num_tokens=800), tmp_path / "plain", lm=lm)
    x, expected = store.read_rows(range(store.num_rows)).float(), plain.read_rows(range(store.num_rows))
    largest = expected.abs().amax(dim=-1, keepdim=True)
    assert bool(((x - expected).abs() <= largest / 14).all())
    np.testing.assert_allclose(store.norms(), x.norm(dim=-1).numpy(), rtol=1e-5)
    assert verify_store(store.path) == []
    shard = store.path / "hooks/model.layers.1/shard-00001.zarr/activations/c/0/0/0"
    whole = shard.read_bytes()
    shutil.copy(shard.parents[5] / "shard-00000.zarr/activations/c/0/0/0", shard)
    assert len(verify_store(store.path, repair=True)) == 1
    cache_activations(config, tmp_path / "cache", lm=lm)
    assert shard.read_bytes() == whole


def test_nan_is_refused_by_quantised_caches_as_well(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    def poison(hidden: torch.Tensor) -> torch.Tensor:
        changed = hidden.clone()
        changed[0, 2, 1] = torch.inf
        return changed

    with replace(lm, "model.layers.1", poison), pytest.raises(NonFiniteError, match="row 0, position 2: Inf"):
        cache_activations(make_config(dtype="int8"), tmp_path / "cache", lm=lm)
