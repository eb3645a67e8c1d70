"""The one-pass contexts against brute force, its independence of batches and order, and its refusals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saekit.errors import ConfigError, DataError, NonFiniteError, StoreError
from saekit.labelling import ContextConfig, FeatureContexts, collect_contexts, collect_contexts_part
from saekit.labelling import reservoir as reservoir_module
from saekit.labelling.collect import draw_rows
from saekit.labelling.contexts import CODES_NAME, CONTEXTS_NAME
from saekit.labelling.reservoir import Events, Reservoir, hash_events, rank_largest
from tests.saekit.labelling.planted import FakeView, identity_sae

ROOT = Path(__file__).parents[3]
CONFIG = ContextConfig(num_top=5, num_per_stratum=3, window=16, num_code_tokens=600, batch_tokens=256)


@pytest.fixture(scope="module")
def contexts(world, tmp_path_factory) -> FeatureContexts:
    return collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path_factory.mktemp("contexts"))


def _train_acts(world) -> np.ndarray:
    return np.where(world.train.mask.reshape(-1)[:, None], world.acts, 0)


def test_counts_maxima_and_means_equal_brute_force(world, contexts) -> None:
    acts = _train_acts(world)
    firing = acts > 0
    np.testing.assert_array_equal(contexts.firing_count, firing.sum(axis=0))
    np.testing.assert_array_equal(contexts.max_act, acts.max(axis=0))
    expected = acts.sum(axis=0, dtype=np.float64) / np.maximum(firing.sum(axis=0), 1)
    np.testing.assert_allclose(contexts.mean_act, expected, rtol=1e-6)
    assert contexts.num_tokens == world.train.num_tokens
    np.testing.assert_allclose(contexts.density, firing.sum(axis=0) / world.train.num_tokens)


def test_histogram_equals_brute_force(world, contexts) -> None:
    acts = _train_acts(world)
    edges = contexts.histogram_edges
    np.testing.assert_allclose(edges[1:] / edges[:-1], 2**0.75, rtol=1e-5)
    for feature in range(contexts.num_features):
        values = np.clip(acts[acts[:, feature] > 0, feature], edges[0], np.nextafter(edges[-1], np.float32(0)))
        np.testing.assert_array_equal(contexts.histogram[feature], np.histogram(values, bins=edges)[0])


def test_top_contexts_equal_brute_force(world, contexts) -> None:
    acts, documents = _train_acts(world), world.store.documents().reshape(-1)
    for feature in range(contexts.num_features):
        order = np.lexsort((np.arange(len(acts)), -acts[:, feature]))
        expected, seen = [], set()
        for flat in order[: int((acts[:, feature] > 0).sum())]:
            if documents[flat] not in seen and len(expected) < CONFIG.num_top:
                seen.add(documents[flat])
                expected.append((int(flat // 64), int(flat % 64), float(acts[flat, feature])))
        assert [(c.row, c.position, c.act) for c in contexts.feature(feature)] == expected


def test_windows_show_the_same_feature_in_the_same_row(world, contexts) -> None:
    acts = _train_acts(world).reshape(*world.store.tokens().shape, -1)
    for feature in (world.feature("digit"), world.feature("dense"), world.feature("river")):
        for context in [*contexts.feature(feature), *contexts.sample(feature)]:
            for offset in range(CONFIG.window):
                position = context.position - CONFIG.window // 2 + offset
                inside = 0 <= position < 64
                act = acts[context.row, position, feature] if inside else 0.0
                level = 255 * act / contexts.max_act[feature]
                # Rounded to 255 parts twice: of the window's largest activation, then of the feature's.
                assert abs(context.window[offset] - level) <= 1


def test_sample_holds_the_smallest_hashes_of_each_stratum(world, contexts) -> None:
    acts, edges = _train_acts(world), contexts.histogram_edges
    for feature in range(contexts.num_features):
        flat = np.flatnonzero(acts[:, feature] > 0)
        stratum = np.clip(np.searchsorted(edges, acts[flat, feature], side="right") - 1, 0, 15)
        keys = hash_events(np.full(len(flat), feature), flat, seed=CONFIG.seed)
        expected = {
            int(f)
            for s in range(16)
            for f in flat[stratum == s][np.argsort(keys[stratum == s])][: CONFIG.num_per_stratum]
        }
        got = contexts.sample(feature)
        assert {c.row * 64 + c.position for c in got} == expected
        assert [c.stratum for c in got] == sorted(c.stratum for c in got)


def test_codes_hold_every_activation_of_the_drawn_rows(world, contexts) -> None:
    codes = contexts.codes()
    rows = np.flatnonzero(draw_rows(world.train, num_tokens=CONFIG.num_code_tokens, seed=CONFIG.seed))
    expected = [f for f in np.flatnonzero(world.train.mask.reshape(-1)) if f // 64 in set(rows.tolist())]
    assert codes.tokens.tolist() == expected
    assert CONFIG.num_code_tokens <= codes.num_tokens < CONFIG.num_code_tokens + 64
    dense = np.zeros((codes.num_tokens, contexts.num_features), dtype=np.float32)
    dense[codes.owners(), codes.indices] = codes.acts
    np.testing.assert_array_equal(dense, world.acts[codes.tokens])


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000], ids=["row by row", "one row", "all at once"])
def test_result_does_not_depend_on_the_batch(world, contexts, tmp_path: Path, batch_tokens: int) -> None:
    config = CONFIG.model_copy(update={"batch_tokens": batch_tokens})
    other = collect_contexts(world.sae, world.train, config=config, out=tmp_path)
    assert (other.path / CONTEXTS_NAME).read_bytes() == (contexts.path / CONTEXTS_NAME).read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), least_pending=st.sampled_from([0, 7, 10**6]), by_document=st.booleans())
def test_reservoirs_in_any_number_and_order_equal_brute_force(
    monkeypatch, seed: int, least_pending: int, by_document: bool
) -> None:
    # How many events wait before they are sorted in is no property of the result.
    monkeypatch.setattr(reservoir_module, "LEAST_PENDING", least_pending)
    generator = np.random.default_rng(seed)
    num_groups, size, num_rows = int(generator.integers(1, 70)), int(generator.integers(1, 6)), 20
    num_places = num_groups * num_rows * 32
    num_events = min(int(generator.integers(1, 1200)), num_places)
    keys = np.sort(generator.choice(num_places, num_events, replace=False) % 9_000)
    feature, flat = np.divmod(np.unique(keys), num_rows * 32)
    # Few different values, so that ties are everywhere.
    acts = generator.integers(1, 5, len(flat)).astype(np.float32)
    owner = flat // 96
    order = np.lexsort((flat, -acts, feature))
    if by_document:
        order = order[np.sort(np.unique(feature[order] * 100 + owner[order], return_index=True)[1])]
    expected = np.full((num_groups, size), -1)
    for group in range(num_groups):
        own = flat[order][feature[order] == group][:size]
        expected[group, : len(own)] = own

    made = []
    for rows in np.array_split(generator.permutation(num_rows), int(generator.integers(1, 4))):
        one = Reservoir(num_groups, size, width=8, dtype=np.uint32)
        for row in rows:
            at = np.flatnonzero(flat // 32 == row)
            events = Events(feature[at], flat[at], acts[at], context_len=32)
            documents = (events.flat // 96).astype(np.int32) if by_document else None
            one.offer(events, events.features, rank_largest(events.acts), documents=documents)
        made.append(one)
    for other in made[1:]:
        made[0].merge(other)
    whole = Reservoir(num_groups, size, width=8, dtype=np.uint32)
    whole.restore(made[0].state())
    found = whole.slots()
    np.testing.assert_array_equal(found.flat, expected)
    values = dict(zip(zip(feature.tolist(), flat.tolist(), strict=True), acts.tolist(), strict=True))
    for group, slot in np.argwhere(found.flat >= 0):
        place = int(found.flat[group, slot])
        near = [values.get((group, p), 0.0) if p // 32 == place // 32 else 0.0 for p in range(place - 4, place + 4)]
        assert found.acts[group, slot] == values[group, place]
        np.testing.assert_array_equal(found.windows[group, slot], np.rint(np.array(near) * (255 / max(near))))


@pytest.mark.parametrize(
    "gap", [1, 2**20, 2**40], ids=["one key holds all", "few bits left", "more bits than a key has"]
)
def test_events_are_sorted_by_feature_and_token_whatever_the_numbers(gap: int) -> None:
    generator = np.random.default_rng(0)
    token, feature = np.nonzero(generator.random((50, 30)) < 0.3)
    acts = generator.lognormal(0, 3, len(token)).astype(np.float32)
    order = generator.permutation(len(token))
    events = Events(feature[order] * gap, token[order] + 7_000, acts[order], context_len=10)
    expected = np.lexsort((token, feature))
    np.testing.assert_array_equal(events.features, feature[expected] * gap)
    np.testing.assert_array_equal(events.flat, token[expected] + 7_000)
    np.testing.assert_array_equal(events.acts, acts[expected])


def test_finished_pass_is_not_done_again_and_another_config_is_refused(world, tmp_path: Path, monkeypatch) -> None:
    collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path)
    monkeypatch.setattr(type(world.sae), "encode_sparse", None)
    again = collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path)
    assert again.num_features == world.sae.d_sae
    with pytest.raises(ConfigError, match="num_top"):
        collect_contexts(world.sae, world.train, config=CONFIG.model_copy(update={"num_top": 6}), out=tmp_path)
    with pytest.raises(ConfigError, match="documents"):
        collect_contexts(world.sae, world.test, config=CONFIG, out=tmp_path)


def test_nan_activations_are_refused_and_nothing_is_left_complete(world, tmp_path: Path, monkeypatch) -> None:
    row, position = (int(place) for place in np.argwhere(world.train.mask)[200])
    x = world.store.x.clone()
    x[row, position, 0] = float("inf")
    monkeypatch.setattr(world.store, "x", x)
    with pytest.raises(NonFiniteError, match=f"row {row}, position {position},"):
        collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path)
    with pytest.raises(StoreError, match="not finished"):
        FeatureContexts.open(tmp_path)


def test_wrong_width_and_empty_view_are_refused(world, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wide, the dictionary needs 3"):
        collect_contexts(identity_sae(3), world.train, config=CONFIG, out=tmp_path)
    with pytest.raises(DataError, match="no tokens"):
        collect_contexts(world.sae, FakeView(world.store, np.zeros_like(world.train.mask)), config=CONFIG, out=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_bytes(p.read_bytes()[:100]), lambda p: p.unlink()], ids=["truncated", "missing"]
)
def test_broken_file_is_refused(world, tmp_path: Path, damage) -> None:
    collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path)
    damage(tmp_path / CONTEXTS_NAME)
    with pytest.raises(StoreError, match="cannot be read"):
        FeatureContexts.open(tmp_path)


def test_folder_without_contexts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no contexts"):
        FeatureContexts.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(StoreError, match="not a manifest"):
        FeatureContexts.open(tmp_path)


def test_bfloat16_activations_are_read(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(world.store, "x", world.store.x.to(torch.bfloat16))
    contexts = collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path)
    assert contexts.firing_count[world.feature("river")] > 0


def test_firings_are_counted_by_place_in_the_row(world, contexts) -> None:
    acts = _train_acts(world).reshape(*world.store.tokens().shape, -1) > 0
    expected = acts.reshape(len(acts), 16, 4, -1).sum(axis=(0, 2)).T
    np.testing.assert_array_equal(contexts.position_count, expected)


def _same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (CONTEXTS_NAME, CODES_NAME))


@pytest.mark.parametrize("num_parts", [2, 7])
def test_parts_in_any_order_give_the_same_files(world, contexts, tmp_path: Path, num_parts: int) -> None:
    parts = {"config": CONFIG, "out": tmp_path, "num_parts": num_parts}
    for part in range(min(num_parts, 5))[::-2]:
        collect_contexts_part(world.sae, world.train, part=part, **parts)
    collect_contexts(world.sae, world.train, **parts)
    assert _same(tmp_path, contexts.path)
    assert not list(tmp_path.glob("part-*"))


def _forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def test_two_processes_one_of_them_killed_give_the_same_files(world, contexts, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"checkpoint_seconds": 0})
    encode, left = world.sae.encode_sparse, [5]

    def dying(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(x)

    def work(part: int) -> None:
        if part == 1:
            world.sae.encode_sparse = dying
        collect_contexts_part(world.sae, world.train, config=config, out=tmp_path, part=part, num_parts=2)

    pids = [_forked(lambda part=part: work(part)) for part in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, -signal.SIGKILL]
    assert len(list(tmp_path.glob("part-*"))) == 2
    collect_contexts(world.sae, world.train, config=config, out=tmp_path, num_parts=2)
    assert _same(tmp_path, contexts.path)


def test_a_part_that_is_not_there_is_refused(world, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="part 3 of 3, needs one of 0 to 2"):
        collect_contexts_part(world.sae, world.train, config=CONFIG, out=tmp_path, part=3, num_parts=3)


_KILLED = """
import os, signal, sys
from tests.saekit.labelling.planted import make_world
from saekit.labelling import ContextConfig, collect_contexts

world, left = make_world(), [int(sys.argv[2])]
encode = world.sae.encode_sparse

def dying(x):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(x)

world.sae.encode_sparse = dying
config = ContextConfig(num_top=5, num_per_stratum=3, window=16, num_code_tokens=600, batch_tokens=256, checkpoint_seconds=0)
collect_contexts(world.sae, world.train, config=config, out=sys.argv[1])
"""


def test_killed_pass_goes_on_and_ends_in_the_same_files(world, contexts, tmp_path: Path, monkeypatch) -> None:
    run = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), "20"], env=dict(os.environ), cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    with pytest.raises(StoreError, match="not finished"):
        FeatureContexts.open(tmp_path)
    calls = []
    encode = type(world.sae).encode_sparse
    monkeypatch.setattr(type(world.sae), "encode_sparse", lambda sae, x: calls.append(len(x)) or encode(sae, x))
    collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path)
    assert len(calls) == -(-len(world.train.rows()) // 4) - 19
    assert _same(tmp_path, contexts.path)


@pytest.mark.parametrize("content", [b"nonsense", b""], ids=["nonsense", "empty"])
def test_broken_part_is_refused(world, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "part-00000-of-00001.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="cannot be read"):
        collect_contexts(world.sae, world.train, config=CONFIG, out=tmp_path)


def test_a_million_events_in_any_order_and_any_number_of_reservoirs_equal_brute_force() -> None:
    generator = np.random.default_rng(5)
    num_events, num_features, context_len, size = 1_000_000, 500, 64, 8
    keys = np.sort(generator.choice(num_features * 40_000, num_events, replace=False))
    feature, flat = np.divmod(keys, 40_000)
    # Two hundred levels, so that ties are everywhere.
    acts = (generator.integers(1, 201, num_events) / 8).astype(np.float32)
    documents = flat // 96
    order = np.lexsort((flat, -acts, feature))
    order = order[np.sort(np.unique(feature[order] * 1_000 + documents[order], return_index=True)[1])]
    first = np.searchsorted(feature[order], np.arange(num_features))
    top = flat[order][first[:, None] + np.arange(size)]
    keyed = hash_events(feature, flat, seed=7)
    by_hash = np.lexsort((keyed, feature))
    sample = flat[by_hash][np.searchsorted(feature[by_hash], np.arange(num_features))[:, None] + np.arange(size)]

    row = flat // context_len
    made = []
    for own in np.array_split(np.random.default_rng(1).permutation(625), 3):
        best = Reservoir(num_features, size, width=4, dtype=np.uint32)
        drawn = Reservoir(num_features, size, width=4, dtype=np.uint64)
        for rows in np.array_split(own, 5):
            at = np.flatnonzero(np.isin(row, rows))
            events = Events(feature[at], flat[at], acts[at], context_len=context_len)
            best.offer(events, events.features, rank_largest(events.acts), documents=events.flat // 96)
            drawn.offer(events, events.features, hash_events(events.features, events.flat, seed=7))
        made.append((best, drawn))
    for best, drawn in made[1:]:
        made[0][0].merge(best)
        made[0][1].merge(drawn)
    np.testing.assert_array_equal(made[0][0].slots().flat, top)
    np.testing.assert_array_equal(made[0][1].slots().flat, sample)
