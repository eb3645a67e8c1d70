"""What `saekit status` reads from manifests."""

from pathlib import Path

import pytest
from saekit_pipelines.status import stage_rows

from saekit.errors import ConfigError
from saekit.manifest import begin_stage, finish_stage


def test_rows_say_what_is_finished_unfinished_and_missing(tmp_path: Path) -> None:
    for name in ("train/topk", "cache", "train/jumprelu"):
        begin_stage(tmp_path / name, name.split("/")[0], {})
    finish_stage(tmp_path / "cache", {"tokens": 1_048_576, "sha256": {"a": "b"}, "fraction": 0.25})
    rows = stage_rows(tmp_path)
    assert [row[:2] for row in rows] == [
        ("cache", "finished"),
        ("train/jumprelu", "unfinished"),
        ("train/topk", "unfinished"),
        ("label", "missing"),
        ("evaluate", "missing"),
        ("report", "missing"),
    ]
    assert rows[0][2] == "fraction 0.25, tokens 1,048,576"
    assert rows[0][3]
    assert rows[1][3] == ""


def test_folder_of_one_stage_is_one_row(tmp_path: Path) -> None:
    begin_stage(tmp_path, "cache", {})
    assert stage_rows(tmp_path) == [("cache", "unfinished", "", "")]


@pytest.mark.parametrize(("folder", "message"), [("nowhere", "no such folder"), (".", "no manifest.json in it")])
def test_other_folders_are_refused(tmp_path: Path, folder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_rows(tmp_path / folder)
