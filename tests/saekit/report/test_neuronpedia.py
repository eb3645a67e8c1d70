"""The Neuronpedia folder: keys as the importer wants them, rows that belong together, and the same bytes every time."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from saekit.activations import ActivationStore
from saekit.errors import ConfigError
from saekit.labelling import Label, read_labels, read_scores
from saekit.labelling.store import RecordFile
from saekit.labelling.vocabulary import Vocabulary
from saekit.report import NeuronpediaConfig, ReportRun, export_neuronpedia
from saekit.report.neuronpedia import FEATURES_PER_FILE

CONFIG = NeuronpediaConfig(
    model_id="tiny",
    source_id="1-mine-res-150",
    creator_id="user1",
    creator_name="Me",
    release="mine",
    model_name="Tiny",
    num_layers=3,
)
# Columns that the database wants in every row and has no default for; those in the list of columns of each table.
NEEDED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features": {"modelId", "layer", "index"},
    "activations": {
        "id",
        "index",
        "layer",
        "modelId",
        "maxValue",
        "maxValueTokenIndex",
        "minValue",
        "values",
        "creatorId",
    },
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
    "explanation_scores": {
        *("id", "initiatedByUserId", "value", "explanationId", "explanationScoreTypeName", "explanationScoreModelName"),
    },
    "explanation_type": {"name", "displayName", "description", "creatorName", "creatorId"},
    "explanation_model_type": {"name", "displayName", "description", "creatorName"},
    "explanation_score_type": {"name", "displayName", "description", "creatorName", "creatorId"},
    "explanation_score_model": {"name", "displayName", "description", "creatorName"},
}


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def run(write_run: Callable[..., ReportRun]) -> ReportRun:
    return write_run("np", labelers=("lexical", "llm:m"), hostile=True)


@pytest.fixture
def exported(run: ReportRun, store: Path, vocabulary: Vocabulary, tmp_path: Path) -> Path:
    return export_neuronpedia(
        run.labels, tmp_path, store=ActivationStore.open(store), vocabulary=vocabulary, config=CONFIG
    )


def rows(folder: Path, table: str) -> list[dict]:
    files = sorted((folder / table).glob("batch-*.jsonl.gz"))
    texts = [gzip.decompress(file.read_bytes()).decode() for file in files] or [(folder / f"{table}.jsonl").read_text()]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_folder_is_called_and_filled_as_the_importer_looks_for_it(exported: Path) -> None:
    assert exported.parts[-2:] == ("tiny", "1-mine-res-150")
    for table, columns in NEEDED.items():
        found = rows(exported, table)
        assert found or table == "explanation_model_type"
        # Columns are taken from a file's first line.
        assert len({tuple(row) for row in found}) <= 1
        assert all(columns <= set(row) for row in found)


def test_rows_belong_together(exported: Path, run: ReportRun) -> None:
    labels = {(label.feature, label.labeler) for label in read_labels(run.labels) if label.status == "done"}
    features = {row["index"] for row in rows(exported, "features")}
    explanations = rows(exported, "explanations")
    assert len(explanations) == len(labels)
    assert all(isinstance(row["index"], str) for row in explanations)
    assert {row["index"] for row in explanations} == features == {str(feature) for feature, _ in labels}
    assert {row["index"] for row in rows(exported, "activations")} <= features
    ids = {row["id"] for row in explanations}
    assert len(ids) == len(explanations)
    assert {row["typeName"] for row in explanations} == {row["name"] for row in rows(exported, "explanation_type")}
    scores = rows(exported, "explanation_scores")
    assert {row["explanationId"] for row in scores} <= ids
    assert {row["explanationScoreTypeName"] for row in scores} == {
        r["name"] for r in rows(exported, "explanation_score_type")
    }
    assert {row["explanationScoreModelName"] for row in scores} == {
        row["name"] for row in rows(exported, "explanation_score_model")
    }
    known = [s for s in read_scores(run.labels) if s.f1 is not None and (s.feature, s.labeler) in labels]
    assert sorted(row["value"] for row in scores) == sorted(score.f1 for score in known)
    assert all(json.loads(row["jsonDetails"])["num_positive"] >= 0 for row in scores)
    (source,), (source_set,) = rows(exported, "source"), rows(exported, "sourceset")
    assert source["setName"] == source_set["name"] == "mine-res-150"
    assert source_set["releaseName"] == rows(exported, "release")[0]["name"]


def test_activations_point_at_their_peak(exported: Path) -> None:
    found = rows(exported, "activations")
    assert len({row["id"] for row in found}) == len(found)
    for row in found:
        assert len(row["tokens"]) == len(row["values"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"]) > 0
        assert len(row["id"]) == 25
        assert row["id"][0] == "c"


def test_export_is_the_same_every_time(
    exported: Path, run: ReportRun, store: Path, vocabulary: Vocabulary, tmp_path
) -> None:
    again = export_neuronpedia(
        run.labels, tmp_path / "again", store=ActivationStore.open(store), vocabulary=vocabulary, config=CONFIG
    )
    files = sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((exported / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_many_rows_are_cut_into_files(exported: Path) -> None:
    sizes = [
        gzip.decompress(file.read_bytes()).count(b"\n")
        for file in sorted((exported / "activations").glob("*.jsonl.gz"))
    ]
    assert len(sizes) > 1
    assert max(sizes) == FEATURES_PER_FILE


def test_no_nul_goes_to_the_database(run: ReportRun, store: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "contexts").symlink_to(run.labels / "contexts")
    RecordFile(folder / "labels.jsonl", Label).extend([Label(feature=0, labeler="llm:m", model="m", label="a\x00b")])
    out = export_neuronpedia(folder, tmp_path, store=ActivationStore.open(store), vocabulary=vocabulary, config=CONFIG)
    (row,) = rows(out, "explanations")
    assert row["description"] == "a b"
    assert rows(out, "explanation_model_type")[0]["name"] == row["explanationModelName"] == "m"
    assert not (out / "explanation_scores").exists()


def test_folder_without_labels_is_refused(store: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no labels to export"):
        export_neuronpedia(tmp_path, tmp_path, store=ActivationStore.open(store), vocabulary=vocabulary, config=CONFIG)


@pytest.mark.parametrize("values", [{"source_id": "mine"}, {"model_id": "A/B"}])
def test_names_that_the_site_does_not_take_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        NeuronpediaConfig.parse({**CONFIG.to_dict(), **values})
