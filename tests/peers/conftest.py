"""Peers' tests run only where they are asked for: `pytest -m peers`, with the environments that `scripts/test_peers` makes."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "peers" in str(config.getoption("markexpr")):
        return
    unwanted = [item for item in items if item.get_closest_marker("peers")]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if not item.get_closest_marker("peers")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The largest difference of each peer's numbers from ours, over all its cases."""
    found: dict[str, list[float]] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        properties = dict(getattr(report, "user_properties", []))
        if "largest_difference" in properties:
            found.setdefault(str(properties["peer"]), []).append(float(properties["largest_difference"]))
    for peer, differences in found.items():
        terminalreporter.write_line(
            f"{peer}: {len(differences)} dictionaries, largest difference {max(differences):.1e}"
        )
