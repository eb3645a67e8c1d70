"""Label files: appended whole, repaired after a torn write, refused when foreign."""

import pytest

from saekit.errors import ResourceError, StoreError
from saekit.labelling import Label, Score, read_labels, read_scores
from saekit.labelling.store import RecordFile

LABELS = [Label(feature=i, labeler="lexical", label=f"\u00e9 {i}\n", rule={"clauses": []}) for i in range(3)]


def test_records_survive_the_disk(tmp_path) -> None:
    file = RecordFile(tmp_path / "labels.jsonl", Label)
    file.extend(LABELS[:2])
    file.extend(LABELS[2:])
    file.extend([])
    assert file.records == read_labels(tmp_path) == LABELS
    assert RecordFile(tmp_path / "labels.jsonl", Label).records == LABELS


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_torn_last_line_is_cut_off_and_written_again(tmp_path, cut: int) -> None:
    path = tmp_path / "labels.jsonl"
    RecordFile(path, Label).extend(LABELS)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_labels(tmp_path) == LABELS[:2]
    file = RecordFile(path, Label)
    assert file.records == LABELS[:2]
    file.extend(LABELS[2:])
    assert read_labels(tmp_path) == LABELS


def test_line_that_is_no_record_is_refused(tmp_path) -> None:
    (tmp_path / "labels.jsonl").write_text('{"feature": 1, "labeler": "x"}\n{"feature": "many"}\n')
    with pytest.raises(StoreError, match="line 2 is no label"):
        read_labels(tmp_path)
    (tmp_path / "scores.jsonl").write_text("{}\n")
    with pytest.raises(StoreError, match="line 1 is no score"):
        read_scores(tmp_path)


def test_no_files_are_no_records(tmp_path) -> None:
    assert read_labels(tmp_path) == read_scores(tmp_path) == []


def test_folder_in_the_way_is_refused(tmp_path) -> None:
    (tmp_path / "labels.jsonl").mkdir()
    with pytest.raises(ResourceError, match="cannot be read"):
        RecordFile(tmp_path / "labels.jsonl", Label)


def test_full_disk_is_named(tmp_path, monkeypatch) -> None:
    import os

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        RecordFile(tmp_path / "scores.jsonl", Score).extend([Score(feature=0, labeler="x", scorer="rule")])
