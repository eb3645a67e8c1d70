"""docs/formats.md says what the table of formats, the writers and the fixtures say."""

import re
from pathlib import Path

from saekit.hub import load_saes
from saekit.hub.export import TARGETS
from saekit.hub.table import FORMATS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
FIXTURES = ROOT / "tests" / "fixtures" / "dictionaries"
# Target of `save_sae` -> the formats that it writes.
WRITTEN = {
    "saelens": {"saelens"},
    "sparsify": {"sparsify"},
    "dictionary_learning": {"dictionary_learning"},
    "circuit-tracer": {"transcoder_set", "cross_layer"},
}


def rows() -> dict[str, dict[str, str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    found = {}
    for line in lines[2:]:
        cells = dict(zip(header, (cell.strip() for cell in line[1:-1].split("|")), strict=True))
        name = re.match(r"`(\w+)`: ", cells["format"])
        assert name is not None, line
        assert name.group(1) not in found, line
        found[name.group(1)] = cells
    return found


def test_every_format_has_one_row_and_is_read() -> None:
    assert rows().keys() == FORMATS.keys()
    assert {row["load"] for row in rows().values()} == {"yes"}


def test_what_is_called_exact_has_a_fixture() -> None:
    tried = {
        str(sae.source["format"])
        for folder in FIXTURES.iterdir()
        if folder.is_dir()
        for sae in load_saes(folder).values()
    }
    assert {name for name, row in rows().items() if row["exact"] == "yes"} == tried


def test_what_is_called_written_has_a_writer() -> None:
    assert WRITTEN.keys() == TARGETS.keys()
    written = {name for name, row in rows().items() if row["written"] == "yes"}
    assert written == set().union(*WRITTEN.values())


def test_published_dictionaries_add_up() -> None:
    counts = [int(row["published"].replace(",", "")) for row in rows().values() if row["published"] != "-"]
    (total,) = re.findall(r"([\d,]+) in all", PAGE)
    assert sum(counts) == int(total.replace(",", ""))
