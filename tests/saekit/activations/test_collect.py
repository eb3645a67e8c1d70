"""Caching: what is stored is what the model computes, and every bad input is told apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saekit.activations import MASSIVE, PADDING, SPECIAL, ActivationStore, CacheConfig, cache_activations
from saekit.errors import ConfigError, DataError, HookPointError, NonFiniteError, ResourceError, SaekitError, StoreError
from saekit.manifest import manifest_sha256, read_manifest
from saekit.models import LanguageModel, capture, replace

MakeConfig = Callable[..., CacheConfig]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYER = "model.layers.1"


def expected(lm: LanguageModel, store: ActivationStore, *, batch_size: int, shard_rows: int) -> Tensor:
    """Captures the store's own rows anew, in the same batches, without the code under test."""
    tokens = torch.from_numpy(store.tokens()).long()
    mask = torch.from_numpy(store.documents() >= 0).long()
    parts = []
    for shard in range(0, len(tokens), shard_rows):
        for first in range(shard, min(shard + shard_rows, len(tokens)), batch_size):
            rows = slice(first, min(first + batch_size, shard + shard_rows))
            padded = None if mask[rows].all() else mask[rows]
            parts.append(capture(lm, tokens[rows], [store.hook_point], attention_mask=padded)[store.hook_point])
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("packing", ["pack", "per_document"])
def test_stored_activations_equal_captured_ones(
    dtype: str, packing: str, make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    tokens = {"context_len": 16, "packing": packing}
    config = make_config(dtype=dtype, tokens=tokens, num_tokens=1000, batch_size=3, shard_tokens=160)
    store = cache_activations(config, tmp_path / "cache", lm=lm)
    assert store.num_rows == 63
    rows = store.read_rows(range(store.num_rows))
    assert rows.dtype == DTYPES[dtype]
    assert torch.equal(rows, expected(lm, store, batch_size=3, shard_rows=9).to(DTYPES[dtype]))
    assert bool((store.kinds() == PADDING).any()) == (packing == "per_document")


def test_several_hook_points_are_those_of_single_caches(
    cached: Path, make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    for number, hook_point in enumerate(["model.layers.1", "model.layers.0:input"]):
        alone = cache_activations(make_config(hook_points=[hook_point]), tmp_path / str(number), lm=lm)
        together = ActivationStore.open(cached, hook_point)
        rows = range(alone.num_rows)
        assert torch.equal(alone.read_rows(rows), together.read_rows(rows))
        assert np.array_equal(alone.norms(), together.norms())


def test_norms_are_those_of_the_stored_values(store: ActivationStore) -> None:
    values = store.read_rows(range(store.num_rows)).double()
    np.testing.assert_allclose(store.norms(), values.norm(dim=-1).numpy(), rtol=1e-6)


def test_every_token_traces_to_its_text(store: ActivationStore, texts: Path, lm: LanguageModel) -> None:
    records = [json.loads(line) for line in store.documents_path.read_text(encoding="utf-8").splitlines()]
    lines = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    tokens, documents, kinds = store.tokens(), store.documents(), store.kinds()
    assert len(records) == store.num_documents
    assert [record["index"] for record in records] == list(range(len(records)))
    for record in records[:-1]:
        own = (documents == record["index"]) & (kinds != SPECIAL)
        assert lm.tokenizer.decode(tokens[own].tolist()) == lines[record["index"]]["text"]
        assert record["num_tokens"] == int((documents == record["index"]).sum())
        assert record["title"] == lines[record["index"]]["title"]
    assert [record["num_tokens"] for record in records if record["title"] == "empty"] == [0]


def test_kinds_tell_padding_and_special_tokens(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    config = make_config(tokens={"context_len": 16, "packing": "per_document", "bos": "always"})
    store = cache_activations(config, tmp_path / "cache", lm=lm)
    kinds, tokens, documents = store.kinds(), store.tokens(), store.documents()
    assert np.all(kinds[:, 0] == SPECIAL)
    assert np.array_equal(kinds == PADDING, documents == -1)
    assert np.array_equal(kinds == SPECIAL, (documents >= 0) & (tokens == lm.tokenizer.bos_token_id))
    statistics = store.statistics
    assert statistics.num_padding == int((documents == -1).sum())
    assert statistics.num_special == store.num_rows


def test_massive_activations_are_told_and_left_out(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path, recorder: Any
) -> None:
    def sink(hidden: Tensor) -> Tensor:
        changed = hidden.clone()
        changed[:, 3] *= 500
        return changed

    with replace(lm, LAYER, sink):
        store = cache_activations(make_config(), tmp_path / "cache", lm=lm, progress=recorder)
    kinds = store.kinds()
    is_special = np.isin(store.tokens(), [lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id])
    assert np.all((kinds[:, 3] == MASSIVE) | is_special[:, 3])
    assert not np.any(kinds[:, :3] == MASSIVE)
    assert not np.any(kinds[:, 4:] == MASSIVE)
    statistics = store.statistics
    assert statistics.num_massive == int((kinds == MASSIVE).sum()) > 50
    assert statistics.massive_variance_share > 0.9
    assert statistics.norm_quantiles[-1] < statistics.massive_threshold < statistics.max_norm
    assert np.isnan(statistics.position_norms[3])
    told = [line for line in recorder.said if "massive" in line]
    assert len(told) == 1
    assert f"{statistics.num_massive} massive activations of 1,600 tokens" in told[0]
    assert store.view().num_tokens == statistics.num_normal
    train, _ = store.split()
    assert train.of_kind(MASSIVE).num_tokens > 0
    assert set(train.of_kind(MASSIVE).documents) <= set(train.documents)


@pytest.mark.parametrize("shard_tokens", [48, 10_000], ids=["three-row-shards", "one-shard"])
def test_statistics_do_not_depend_on_the_shards(
    shard_tokens: int, make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    # One row a forward: the last bits of a forward depend on its batch, which ends with the shard.
    stores = [
        cache_activations(make_config(batch_size=1, shard_tokens=tokens), tmp_path / str(tokens), lm=lm)
        for tokens in (512, shard_tokens)
    ]
    files = [store.path / "hooks" / LAYER / "statistics.json" for store in stores]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_second_run_computes_nothing(copied: Path, make_config: MakeConfig, lm: LanguageModel) -> None:
    config = make_config(hook_points=["model.layers.1", "model.layers.0:input"])
    before = manifest_sha256(copied)

    def refuse(hidden: Tensor) -> Tensor:
        raise AssertionError("a forward was run")

    with replace(lm, "model.layers.0", refuse):
        store = cache_activations(config, copied, lm=lm)
    assert store.sha256 == before


def test_text_shorter_than_asked_is_cached_whole_and_said(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path, recorder: Any
) -> None:
    store = cache_activations(make_config(num_tokens=10**6), tmp_path / "cache", lm=lm, progress=recorder)
    assert 1600 < store.num_tokens < 10**5
    manifest = read_manifest(store.path)
    assert manifest is not None
    assert manifest.counts["tokens"] == store.num_tokens
    assert any(f"ends after {store.num_tokens:,} of the 1,000,000 tokens" in line for line in recorder.said)
    assert any("48 documents, 1 of which are empty" in line for line in recorder.said)
    assert recorder.advanced["cache"] == store.num_tokens


@pytest.mark.parametrize(
    "changes, key",
    [({"dtype": "float32"}, "dtype"), ({"tokens": {"context_len": 8}}, "tokens.context_len")],
    ids=["dtype", "context"],
)
def test_other_config_is_refused_by_key(
    changes: dict[str, object], key: str, copied: Path, make_config: MakeConfig, lm: LanguageModel
) -> None:
    config = make_config(hook_points=["model.layers.1", "model.layers.0:input"], **changes)
    with pytest.raises(ConfigError, match=f"another config: {key} "):
        cache_activations(config, copied, lm=lm)


def test_changed_text_is_refused(make_config: MakeConfig, lm: LanguageModel, texts: Path, tmp_path: Path) -> None:
    own = tmp_path / "texts.jsonl"
    own.write_bytes(texts.read_bytes())
    config = make_config(text={"kind": "files", "paths": [str(own)]})
    cache_activations(config, tmp_path / "cache", lm=lm)
    own.write_text('{"text": "' + "other words " * 500 + '"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="input text has changed"):
        cache_activations(config, tmp_path / "cache", lm=lm)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("hook_points", [], "hook_points"),
        ("hook_points", ["model.layers.1", "model.layers.1:output"], "named twice"),
        ("hook_points", ["model.layers.1:side"], "needs 'input' or 'output'"),
        ("num_tokens", 0, "num_tokens"),
        ("dtype", "int4", "dtype"),
        ("compression", "gzip", "compression"),
        ("massive_factor", 1.0, "massive_factor"),
    ],
)
def test_bad_config_is_refused(field: str, value: object, message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**{field: value})


def test_unknown_hook_point_leaves_nothing(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(HookPointError, match=r"model\.layer\.1"):
        cache_activations(make_config(hook_points=["model.layer.1"]), tmp_path / "cache", lm=lm)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": "  "}\n'], ids=["no-documents", "empty-documents"])
def test_empty_text_leaves_nothing(content: str, make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError):
        cache_activations(make_config(text={"kind": "files", "paths": [str(path)]}), tmp_path / "cache", lm=lm)
    assert not (tmp_path / "cache").exists()


def planted(value: float, *, call: int) -> Callable[[Tensor], Tensor]:
    """Returns a replacement that puts `value` at row 2, position 5 of the forward with this number."""
    calls = 0

    def plant(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls != call:
            return hidden
        changed = hidden.clone()
        changed[2, 5, 7] = value
        return changed

    return plant


# Two forwards belong to the preflight; four of eight rows make a shard: the eighth after them is the last of shard 1.
PLACE = r"'model\.layers\.1': shard 1, row 58, position 5: "


@pytest.mark.parametrize(
    "value, dtype, error, message",
    [
        (float("nan"), "bfloat16", NonFiniteError, PLACE + "NaN"),
        (float("-inf"), "float16", NonFiniteError, PLACE + "Inf"),
        (float("inf"), "float32", NonFiniteError, PLACE + "Inf"),
        (65_505.0, "float16", StoreError, PLACE + "65,505, float16 holds up to 65,504; set dtype = 'bfloat16'"),
        (-70_000.0, "float16", StoreError, PLACE + "-70,000, float16"),
        (3.4e38, "bfloat16", StoreError, PLACE + ".*set dtype = 'float32'"),
    ],
    ids=["nan", "inf-float16", "inf-float32", "rounds-to-max", "overflow", "overflow-bfloat16"],
)
def test_values_that_cannot_be_stored_are_refused_by_place(
    value: float,
    dtype: str,
    error: type[Exception],
    message: str,
    make_config: MakeConfig,
    lm: LanguageModel,
    tmp_path: Path,
) -> None:
    out = tmp_path / "cache"
    with replace(lm, LAYER, planted(value, call=10)), pytest.raises(error, match=message) as raised:
        cache_activations(make_config(dtype=dtype), out, lm=lm)
    assert "\n" not in str(raised.value)
    with pytest.raises(StoreError, match="not finished"):
        ActivationStore.open(out)


def test_largest_float16_is_stored(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    with replace(lm, LAYER, planted(65_504.0, call=10)):
        store = cache_activations(make_config(dtype="float16"), tmp_path / "cache", lm=lm)
    assert store.read_rows([58])[0, 5, 7] == 65_504.0


def test_a_folder_that_another_process_writes_is_refused(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path
) -> None:
    import fcntl

    out = tmp_path / "cache"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="another process"):
            cache_activations(make_config(), out, lm=lm)


def test_a_folder_below_a_file_is_refused(make_config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaekitError, match="file/cache"):
        cache_activations(make_config(), tmp_path / "file" / "cache", lm=lm)


def test_a_read_only_folder_is_refused(
    make_config: MakeConfig, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(ResourceError, match="Permission denied"):
        cache_activations(make_config(), tmp_path / "cache", lm=lm)
