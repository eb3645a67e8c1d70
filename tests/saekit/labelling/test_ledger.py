"""The ledger: what is recorded survives, what was open at a kill is counted, sums never drift from the rows."""

import sqlite3

import pytest

from saekit.errors import ResourceError, StoreError
from saekit.labelling import ChatReply, ChatRequest, Ledger
from saekit.labelling.ledger import _is_on_network


def request(number: int, *, purpose: str = "explain:raw") -> ChatRequest:
    return ChatRequest(
        model="m",
        system="s",
        user=f"u{number}",
        schema_name="n",
        schema={},
        temperature=0.0,
        max_output_tokens=50,
        purpose=purpose,
        feature=number,
    )


REPLY = ChatReply(
    text="t", finish_reason="stop", input_tokens=30, output_tokens=2, cached_tokens=8, refusal="no", cost=0.25
)


def sums(ledger: Ledger) -> list[object]:
    return [ledger.num_sent, ledger.answered, ledger.open, ledger.lost, ledger.wasted]


def reopened(ledger: Ledger, path) -> Ledger:
    """The same file again, whose sums come from its rows."""
    before = sums(ledger)
    ledger.close()
    again = Ledger(path)
    assert sums(again) == before
    return again


def test_answers_and_sums_survive_and_agree_with_the_rows(tmp_path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    for number in range(6):
        ledger.send(request(number), (40, 50))
    ledger = reopened(ledger, path)
    assert (ledger.open.requests, ledger.open.input, ledger.open.output) == (6, 240, 300)
    ledger.record(request(0).key(), REPLY)
    ledger.record(request(1).key(), ChatReply(text="", finish_reason="length", input_tokens=1, output_tokens=1))
    ledger.drop(request(2).key(), None)
    ledger.drop(request(3).key(), (7, 1), cost=0.5)
    ledger.drop(request(4).key(), (0, 0))
    ledger.fail(request(4), "too long")
    ledger = reopened(ledger, path)
    assert ledger.find(request(0).key()) == REPLY
    assert ledger.find(request(4).key()) == "too long"
    assert [ledger.find(request(n).key()) for n in (2, 3, 5)] == [None, None, None]
    assert (ledger.answered.requests, ledger.answered.input, ledger.answered.cost) == (2, 31, 0.25)
    assert (ledger.lost.requests, ledger.lost.input, ledger.lost.output) == (1, 40, 50)
    assert (ledger.wasted.requests, ledger.wasted.input, ledger.wasted.cost) == (1, 7, 0.5)
    assert (ledger.open.requests, ledger.num_sent) == (1, 6)
    assert ledger.cost_of_features() == {0: 0.25}
    assert ledger.mean_tokens("explain:raw") == (2, 15.5, 1.5)


def test_requests_of_a_killed_run_are_lost_and_those_in_batches_are_not(tmp_path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.send(request(0), (40, 50))
    ledger.send(request(1), (40, 50), batch="tag")
    ledger = reopened(ledger, path)
    assert ledger.count_interrupted() == 1
    assert ledger.count_interrupted() == 0
    ledger = reopened(ledger, path)
    assert (ledger.lost.input, ledger.lost.output, ledger.open.requests) == (40, 50, 1)
    assert ledger.open_batches() == [("tag", None)]
    assert ledger.keys_in("tag") == {request(1).key()}
    ledger.name_batch("tag", "batch_1")
    assert ledger.open_batches() == [("tag", "batch_1")]
    ledger.close_batch("tag")
    assert (ledger.open_batches(), ledger.open.requests, ledger.lost.requests) == ([], 0, 1)


def test_questions_about_a_failed_feature_become_new_and_stay_paid(tmp_path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    for number, purpose in ((0, "explain:raw"), (1, "explain:raw"), (2, "judge")):
        ledger.send(request(number, purpose=purpose), (40, 50))
        ledger.record(request(number).key(), REPLY)
    ledger.retry("explain:raw", 0)
    ledger.retry("judge", 0)
    assert ledger.find(request(0).key()) is None
    assert ledger.find(request(1).key()) == ledger.find(request(2).key()) == REPLY
    for _ in range(2):
        ledger.send(request(0), (40, 50))
        ledger.record(request(0).key(), REPLY)
        ledger.retry("explain:raw", 0)
    ledger = reopened(ledger, path)
    assert ledger.answered.requests == 5
    assert ledger.cost_of_features() == {0: 0.75, 1: 0.25, 2: 0.25}


def test_what_is_written_together_is_there_whole_or_not_at_all(tmp_path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    with pytest.raises(ZeroDivisionError), ledger.together():
        ledger.send(request(0), (40, 50))
        raise ZeroDivisionError
    assert (ledger.num_sent, ledger.open.requests, ledger.find(request(0).key())) == (0, 0, None)
    with ledger.together():
        ledger.send(request(0), (40, 50))
    assert reopened(ledger, tmp_path / "l.sqlite").open.requests == 1


def test_others_may_read_while_it_is_open(tmp_path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.send(request(0), (40, 50))
    reader = sqlite3.connect(tmp_path / "l.sqlite")
    assert reader.execute("select state from requests").fetchall() == [("sent",)]
    ledger.record(request(0).key(), REPLY)
    assert reader.execute("select state from requests").fetchall() == [("answered",)]
    assert reader.execute("pragma journal_mode").fetchone() == ("wal",)
    reader.close()


def test_broken_ledger_is_refused(tmp_path) -> None:
    (tmp_path / "l.sqlite").write_text("nonsense" * 200)
    with pytest.raises(StoreError, match="no ledger of answers"):
        Ledger(tmp_path / "l.sqlite")


def test_folder_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ResourceError, match="cannot be opened"):
        Ledger(tmp_path / "none" / "l.sqlite")


def test_ledger_that_is_gone_in_the_middle_is_named(tmp_path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger._db.execute("drop table requests")
    with pytest.raises(ResourceError, match="answers recorded so far are kept"):
        ledger.find("k")


@pytest.mark.parametrize(("kind", "expected"), [("nfs4", True), ("fuse.sshfs", True), ("ext4", False), ("xfs", False)])
def test_network_folder_is_known(kind: str, expected: bool, tmp_path, monkeypatch) -> None:
    import os
    from pathlib import Path

    device = tmp_path.stat().st_dev
    lines = f"1 0 0:1 / /other rw - nfs x rw\n2 0 {os.major(device)}:{os.minor(device)} / / rw shared:1 - {kind} x rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: lines)
    assert _is_on_network(tmp_path / "l.sqlite") is expected
