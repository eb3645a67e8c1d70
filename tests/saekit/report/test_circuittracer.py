"""Labels in a circuit-tracer graph: in feature nodes of the right layer, and nowhere else."""

import json
from pathlib import Path

import pytest

from saekit.errors import FormatError
from saekit.labelling import Label
from saekit.report import circuit_tracer_labels, label_graph

LABELS = [
    Label(feature=7, labeler="lexical", label="rule"),
    Label(feature=7, labeler="llm:m", label="words"),
    Label(feature=8, labeler="lexical", label="eight"),
    Label(feature=9, labeler="llm:m", status="failed", reason="x"),
]


def _node(node_id: str, kind: str = "cross layer transcoder", clerp: str = "") -> dict[str, object]:
    return {"node_id": node_id, "feature_type": kind, "clerp": clerp, "layer": node_id[0]}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    nodes = [
        _node("2_7_0"),
        _node("2_7_11"),
        _node("3_7_0"),
        _node("2_9_1"),
        _node("2_8_1", clerp="mine"),
        _node("2_8_2", "logit"),
        _node("2_-1_7", "mlp reconstruction error"),
        _node("E_7_0", "embedding"),
    ]
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"metadata": {"slug": "x"}, "nodes": nodes, "links": []}))
    return path


def test_labels_are_named_by_layer_and_feature_and_the_best_labeler_goes_first() -> None:
    assert circuit_tracer_labels(LABELS, layer=2, labelers=["llm:m"]) == {"2_7": "words", "2_8": "eight"}
    assert circuit_tracer_labels(LABELS, layer=3) == {"3_7": "rule", "3_8": "eight"}


def test_feature_nodes_without_a_label_get_one(graph: Path, tmp_path: Path) -> None:
    labels = circuit_tracer_labels(LABELS, layer=2)
    assert label_graph(graph, labels, out=tmp_path / "new.json") == 2
    new, old = (json.loads(path.read_text()) for path in (tmp_path / "new.json", graph))
    assert [node["clerp"] for node in new["nodes"]] == ["rule", "rule", "", "", "mine", "", "", ""]
    assert {key: value for key, value in new.items() if key != "nodes"} == {
        k: v for k, v in old.items() if k != "nodes"
    }
    assert label_graph(graph, labels) == 2
    assert json.loads(graph.read_text()) == new


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"nodes": [{"node_id": "1_2_3"}]}', '{"links": []}'])
def test_file_that_is_no_graph_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "graph.json").write_text(text)
    with pytest.raises(FormatError, match="no graph of circuit-tracer"):
        label_graph(tmp_path / "graph.json", {})
