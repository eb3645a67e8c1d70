"""Labels in circuit-tracer's graphs: the `clerp` of each feature node.

Source: safety-research/circuit-tracer, frontend/graph_models.py: a feature node has `feature_type` "cross layer transcoder" and an id
`<layer>_<feature>_<position>`; `clerp` is the text that the graph shows for it, empty when it is made.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from saekit.errors import FormatError
from saekit.labelling import Label
from saekit.manifest import write_json

__all__ = ["circuit_tracer_labels", "label_graph"]

FEATURE_NODE = "cross layer transcoder"


def circuit_tracer_labels(labels: Iterable[Label], *, layer: int, labelers: Iterable[str] = ()) -> dict[str, str]:
    """Returns `<layer>_<feature>` -> label, as nodes of that layer are called without their position.

    Args:
        layer: of the dictionary in the graph.
        labelers: whose label is taken where a feature has several, best first; others come after them in the order given.
    """
    order = {labeler: rank for rank, labeler in enumerate(labelers)}
    done = [label for label in labels if label.status == "done"]
    ranked = sorted(done, key=lambda label: order.get(label.labeler, len(order)))
    found: dict[str, str] = {}
    for label in ranked:
        found.setdefault(f"{layer}_{label.feature}", label.label)
    return found


def label_graph(graph: str | Path, labels: Mapping[str, str], *, out: str | Path | None = None) -> int:
    """Writes labels into the feature nodes of a graph file that has none there yet; returns how many.

    Args:
        graph: file that circuit-tracer wrote.
        labels: see `circuit_tracer_labels`; those of several layers may be joined.
        out: None: the file itself.

    Raises:
        FormatError: the file is no such graph.
    """
    try:
        value = json.loads(Path(graph).read_text(encoding="utf-8"))
        nodes = [node for node in value["nodes"] if node["feature_type"] == FEATURE_NODE]
        named = [(node, str(node["node_id"]).rpartition("_")[0]) for node in nodes if not node.get("clerp")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{str(graph)!r}: no graph of circuit-tracer ({error!r}), needs a JSON file with nodes"
        ) from error
    wanted = [(node, labels[name]) for node, name in named if name in labels]
    for node, text in wanted:
        node["clerp"] = text
    write_json(graph if out is None else out, value)
    return len(wanted)
