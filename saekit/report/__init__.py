"""A static feature browser: overview, feature table and one panel per feature, from the folders of the other stages."""

from saekit.report.site import build_report
from saekit.report.sources import ReportRun
from saekit.report.writer import ReportConfig

__all__ = ["ReportConfig", "ReportRun", "build_report"]
