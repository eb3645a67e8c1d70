"""A static feature browser: overview, feature table and one panel per feature, from the folders of the other stages."""

from saekit.report.circuittracer import circuit_tracer_labels, label_graph
from saekit.report.neuronpedia import NeuronpediaConfig, export_neuronpedia
from saekit.report.site import build_report
from saekit.report.sources import ReportRun
from saekit.report.writer import ReportConfig

__all__ = [
    "NeuronpediaConfig",
    "ReportConfig",
    "ReportRun",
    "build_report",
    "circuit_tracer_labels",
    "export_neuronpedia",
    "label_graph",
]
