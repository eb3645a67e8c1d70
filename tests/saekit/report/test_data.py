"""The data files against the folders they were made from, read by independent means."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from saekit.activations import ActivationStore
from saekit.labelling import Score
from saekit.report.judged import score_figures
from saekit.report.text import TIE, visible

Read = Callable[[Path], dict[str, Any]]
Unpack = Callable[[str], np.ndarray]


@pytest.fixture(scope="module")
def source(report: Any) -> dict[str, np.ndarray]:
    """The contexts file of the first run."""
    return load_file(report.runs[0].labels / "contexts" / "contexts.safetensors")


@pytest.fixture(scope="module")
def index(report: Any, read_payload: Read) -> dict[str, Any]:
    """The index of the first run."""
    return read_payload(report.folder / "data" / "topk" / "index.js")


@pytest.fixture(scope="module")
def pieces(report: Any, read_payload: Read) -> dict[str, Any]:
    """The pieces of the report."""
    return read_payload(report.folder / "data" / "pieces.js")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_index_columns_equal_their_sources(
    report: Any, index: dict[str, Any], source: dict[str, np.ndarray], unpack: Unpack
) -> None:
    assert index["count"] == 150
    np.testing.assert_allclose(unpack(index["density"]), source["firing_count"] / 200_000, rtol=1e-6)
    np.testing.assert_array_equal(unpack(index["max"]), source["max_act"])
    assert [labeler["name"] for labeler in index["labelers"]] == ["llm:judge-1", "lexical"]
    assert [labeler["scorer"] for labeler in index["labelers"]] == ["detection", "rule"]
    labels = {
        (line["labeler"], line["feature"]): line.get("label") for line in _lines(report.runs[0].labels / "labels.jsonl")
    }
    scores = {(line["labeler"], line["feature"]): line["f1"] for line in _lines(report.runs[0].labels / "scores.jsonl")}
    for labeler in index["labelers"]:
        name = labeler["name"]
        assert labeler["labels"] == [labels.get((name, feature)) for feature in range(150)]
        expected = [scores.get((name, feature), np.nan) for feature in range(150)]
        np.testing.assert_allclose(unpack(labeler["f1"]), expected, rtol=1e-6)


def test_index_words_are_the_most_frequent_peak_tokens(
    report: Any, index: dict[str, Any], source: dict[str, np.ndarray], unpack: Unpack, tokenizer: Any
) -> None:
    tokens = ActivationStore.open(report.store).tokens()
    slots = unpack(index["peak"]).reshape(150, -1)
    checked = 0
    for feature in range(150):
        used = source["top_row"][feature] >= 0
        peaks = tokens[source["top_row"][feature][used], source["top_position"][feature][used]].tolist()
        shown = [index["words"][slot] for slot in slots[feature] if slot != 0xFFFFFFFF]
        assert len(shown) == min(4, len(set(peaks)))
        if peaks:
            most = max(set(peaks), key=lambda token: (peaks.count(token), -peaks.index(token)))
            text = tokenizer.decode([most])
            checked += "\ufffd" not in text
            assert "\ufffd" in text or shown[0] == visible(text)
    assert checked > 100


def test_chunks_hold_every_feature_once(report: Any, read_payload: Read) -> None:
    for run, count in zip(report.runs, (150, 70, 20), strict=True):
        chunks = [read_payload(path) for path in sorted((report.folder / "data" / run.name).glob("chunk-*.js"))]
        spans = [(chunk["start"], chunk["count"]) for chunk in chunks]
        assert [start for start, _ in spans] == list(range(0, count, 64))
        assert sum(size for _, size in spans) == count
        assert all(len(chunk["labels"]) == chunk["count"] for chunk in chunks)


@pytest.mark.parametrize("feature", [0, 3, 64, 149], ids=["first", "few-contexts", "second-chunk", "dead"])
@pytest.mark.parametrize(("kind", "prefix", "limit"), [("top", "top", 20), ("sampled", "sample", 20)])
def test_contexts_equal_their_sources(
    report: Any, source: dict[str, np.ndarray], pieces: dict[str, Any], read_payload: Read, unpack: Unpack,
    tokenizer: Any, feature: int, kind: str, prefix: str, limit: int,
) -> None:  # fmt: skip
    chunk = read_payload(report.folder / "data" / "topk" / f"chunk-{feature // 64:04d}.js")
    block, slot = chunk[kind], feature % 64
    start, stop = unpack(block["offsets"])[slot : slot + 2]
    used = np.flatnonzero(source[f"{prefix}_row"][feature] >= 0)
    if kind == "sampled" and len(used):
        assert len(used) == 24
        used = used[np.linspace(0, 23, limit).round().astype(int)]
    assert stop - start == len(used)
    np.testing.assert_array_equal(unpack(block["act"])[start:stop], source[f"{prefix}_act"][feature][used])
    np.testing.assert_array_equal(unpack(block["position"])[start:stop], source[f"{prefix}_position"][feature][used])
    windows = unpack(block["window"]).reshape(-1, 32)[start:stop]
    np.testing.assert_array_equal(windows, source[f"{prefix}_window"][feature][used])
    store = ActivationStore.open(report.store)
    rows = read_payload(report.folder / "data" / "rows-0000.js")
    row_ids = unpack(rows["row"])
    np.testing.assert_array_equal(row_ids[unpack(block["place"])[start:stop]], source[f"{prefix}_row"][feature][used])
    documents = store.documents()[source[f"{prefix}_row"][feature][used], source[f"{prefix}_position"][feature][used]]
    np.testing.assert_array_equal(unpack(block["document"])[start:stop], documents)
    shown = unpack(block["pieces"]).reshape(-1, 32)[start:stop]
    for n, place in enumerate(used):
        row = source[f"{prefix}_row"][feature][place]
        first = source[f"{prefix}_position"][feature][place] - 16
        for offset, piece in enumerate(shown[n]):
            inside = 0 <= first + offset < store.context_len
            assert (piece != 0xFFFF) == inside
            if inside:
                text = tokenizer.decode([store.tokens()[row, first + offset]])
                assert "\ufffd" in text or pieces["pieces"][piece] == visible(text)


def test_rows_spell_the_documents(
    report: Any, pieces: dict[str, Any], read_payload: Read, unpack: Unpack, tokenizer: Any
) -> None:
    rows = read_payload(report.folder / "data" / "rows-0000.js")
    store = ActivationStore.open(report.store)
    shown = unpack(rows["pieces"]).reshape(-1, store.context_len)
    assert len(shown) == store.num_rows
    broken = 0
    for row, tokens in zip(shown, store.tokens().tolist(), strict=True):
        spelled = "".join(pieces["pieces"][piece] for piece in row if pieces["pieces"][piece] != TIE)
        # A character that two rows share is bytes at both ends; decode writes a replacement character there.
        spelled, found = re.subn(r"(\\x[0-9a-f]{2})+", "\ufffd", spelled)
        broken += found
        assert spelled == re.sub("\ufffd+", "\ufffd", visible(tokenizer.decode(tokens)))
    assert broken == 2


@pytest.mark.parametrize("kind", ["vocabproj", "tokenchange"])
def test_effects_equal_their_sources(
    report: Any, pieces: dict[str, Any], read_payload: Read, unpack: Unpack, tokenizer: Any, kind: str
) -> None:
    arrays = load_file(report.runs[0].labels / f"effects-{kind}.safetensors")
    block = read_payload(report.folder / "data" / "topk" / "chunk-0001.js")["effects"][kind]
    here = (arrays["features"] >= 64) & (arrays["features"] < 128)
    np.testing.assert_array_equal(unpack(block["features"]) + 64, arrays["features"][here])
    for side in ("promoted", "suppressed"):
        np.testing.assert_array_equal(unpack(block[f"{side}_values"]), arrays[f"{side}_values"][here].ravel())
        for piece, token in zip(unpack(block[side]), arrays[f"{side}_ids"][here].ravel(), strict=True):
            text = tokenizer.decode([token])
            assert "\ufffd" in text or pieces["pieces"][piece] == visible(text)


def test_labels_and_scores_equal_their_sources(report: Any, pieces: dict[str, Any], read_payload: Read) -> None:
    chunk = read_payload(report.folder / "data" / "topk" / "chunk-0000.js")
    labels = {(line["feature"], line["labeler"]): line for line in _lines(report.runs[0].labels / "labels.jsonl")}
    scores = {(line["feature"], line["labeler"]): line for line in _lines(report.runs[0].labels / "scores.jsonl")}
    assert [label["labeler"] for label in chunk["labels"][7]] == ["llm:judge-1", "lexical"]
    for feature in (0, 7, 63):
        for shown in chunk["labels"][feature]:
            expected = labels[feature, shown["labeler"]]
            for name in ("label", "description", "fires_on", "promotes", "confidence"):
                assert shown[name] == expected[name]
            (score,) = shown["scores"]
            assert score | scores[feature, shown["labeler"]] == {**score, **scores[feature, shown["labeler"]]}
            assert {name: score[name] for name in ("f1", "low", "high", "auprc", "base_rate", "num_positive")} == {
                name: scores[feature, shown["labeler"]][name]
                for name in ("f1", "low", "high", "auprc", "base_rate", "num_positive")
            }
    failed = chunk["labels"][5]
    assert [label["status"] for label in failed] == ["failed", "failed"]
    assert failed[0]["reason"] == "no answer in 3 tries"


def test_neighbors_and_histograms_equal_their_sources(
    report: Any, source: dict[str, np.ndarray], read_payload: Read, unpack: Unpack
) -> None:
    chunk = read_payload(report.folder / "data" / "topk" / "chunk-0002.js")
    measures = load_file(report.runs[0].evaluation / "features.safetensors")
    np.testing.assert_array_equal(unpack(chunk["neighbors"]), measures["neighbor_indices"][128:].ravel())
    np.testing.assert_array_equal(unpack(chunk["cosines"]), measures["neighbor_cosines"][128:].ravel())
    np.testing.assert_array_equal(unpack(chunk["histogram"]), source["histogram"][128:].ravel())
    np.testing.assert_array_equal(unpack(chunk["firings"]), source["firing_count"][128:])
    np.testing.assert_array_equal(unpack(chunk["mean"]), source["mean_act"][128:])


def test_a_run_without_other_folders_says_so(report: Any, read_payload: Read) -> None:
    index = read_payload(report.folder / "data" / "bare" / "index.js")
    assert {name: index[name] for name in ("density", "max", "peak", "promoted", "labelers")} == {
        "density": None,
        "max": None,
        "peak": None,
        "promoted": None,
        "labelers": [],
    }
    chunk = read_payload(report.folder / "data" / "bare" / "chunk-0000.js")
    assert chunk["top"] is None
    assert chunk["neighbors"] is None
    assert chunk["effects"] == {}
    assert chunk["labels"] == [[]] * 20
    run = read_payload(report.folder / "data" / "report.js")["runs"][2]
    assert (run["evaluation"], run["density"], run["labelers"]) == (None, None, [])
    assert run["features"] == {"total": 20, "firing": None, "labelled": None}


def test_every_number_of_a_score_is_shown_also_of_scorers_to_come() -> None:
    class Later(Score):
        pearson: float | None = None
        sentences: int | None = None

    shown = score_figures(Later(feature=7, labeler="x", scorer="detection", judge="j", pearson=-0.25, right=(True,)))
    assert shown["pearson"] == -0.25
    assert (shown["scorer"], shown["judge"], shown["f1"]) == ("detection", "j", None)
    assert not {"feature", "right", "sentences"} & set(shown)


def test_controls_of_a_feature_and_of_the_run_stand_beside_the_judged_labels(report: Any, read_payload: Read) -> None:
    folder = report.folder / "data"
    chunk = read_payload(folder / "topk" / "chunk-0000.js")
    controls = {control["labeler"]: control["f1"] for control in chunk["controls"][0]}
    assert controls == {"control:empty": 0.0, "control:random": 0.125, "control:shuffled": 0.25}
    assert not any(chunk["controls"][1:])
    run = read_payload(folder / "report.js")["runs"][0]
    f1 = [line["f1"] for line in _lines(report.runs[0].labels / "scores.jsonl") if line["scorer"] == "detection"]
    means = {(entry["labeler"], entry["is_control"]): entry["f1"] for entry in run["judged"]}
    assert means == {
        ("llm:judge-1", False): pytest.approx(np.mean(f1)),
        ("control:empty", True): 0.0,
        ("control:random", True): 0.125,
        ("control:shuffled", True): 0.25,
    }
    entry = next(entry for entry in run["judged"] if not entry["is_control"])
    assert entry["auprc_natural"] == pytest.approx(0.4 * np.mean(f1))
    assert len(entry["f1_interval"]) == 2
    outcome = {one["name"]: one for one in run["outcome"]["labelers"]}
    assert (outcome["lexical"]["labelled"], outcome["lexical"]["failed"]) == (139, 1)
    assert outcome["llm:judge-1"]["failed_reasons"] == {"no answer in 3 tries": 1}
    assert run["outcome"]["llm"]["cost"] == 0.1534


def test_a_run_that_nobody_labelled_has_nothing_to_judge(report: Any, read_payload: Read) -> None:
    bare = read_payload(report.folder / "data" / "report.js")["runs"][2]
    assert (bare["judged"], bare["outcome"]) == ([], None)
