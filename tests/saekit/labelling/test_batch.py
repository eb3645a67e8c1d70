"""The Batch API against a server that loses, repeats, refuses and expires: each request ends once and is paid once."""

import dataclasses
import json
from collections.abc import Callable

import pytest

from saekit.errors import LabelerError
from saekit.labelling import Answer, BatchConfig, ChatRequest, LabellingModel, Ledger, LLMConfig
from saekit.labelling.batch import OpenAIBatch
from saekit.labelling.chat import SpentError
from tests.saekit.labelling.batchstub import BatchServer, batch_serving, shuffled
from tests.saekit.labelling.stub import Fault
from tests.saekit.labelling.test_client import REQUEST, Notices

NUM = 12
REQUESTS = [dataclasses.replace(REQUEST, user=f"question {n}", feature=n, purpose="test") for n in range(NUM)]


def echo(body: dict[str, object], _: int) -> str:
    return json.dumps({"said": body["messages"][1]["content"]})  # type: ignore[index]


class Runs:
    """Runs of the same command on one ledger."""

    def __init__(self, server: BatchServer, folder, **options: object) -> None:
        batch = BatchConfig(poll_seconds=0, max_requests=int(options.pop("max_requests_in_batch", 50)))  # type: ignore[call-overload]
        values = {"model": "m", "base_url": server.url, "backend": "batch", "batch": batch}
        self.config = LLMConfig.model_validate(values | {"wait_seconds": 0.001, "max_wait_seconds": 0.01} | options)
        self.path = folder / "ledger.sqlite"
        self.notices = Notices()
        self.open: Ledger | None = None

    def ask(self, requests: list[ChatRequest] = REQUESTS) -> list[Answer]:
        self.open = Ledger(self.path)
        try:
            client = OpenAIBatch(self.config)
            return LabellingModel(client, self.open, self.config, progress=self.notices).ask(requests)
        finally:
            self.sums = (self.open.answered, self.open.open, self.open.lost, self.open.wasted)
            self.open.close()


def check(server: BatchServer, runs: Runs, answers: list[Answer]) -> None:
    """Every question has its own answer, and the ledger's sums are the server's."""
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert answer.reply is not None, answer.reason
        assert json.loads(answer.reply.text) == {"said": request.user}
    ledger = Ledger(runs.path)
    assert (ledger.answered, ledger.open, ledger.lost, ledger.wasted) == runs.sums
    assert ledger.answered.requests == len(server.charged) == NUM
    assert ledger.answered.input == sum(tokens for tokens, _ in server.charged)
    assert (ledger.open.requests, ledger.lost.requests, ledger.open_batches()) == (0, 0, [])
    ledger.close()


def test_results_out_of_order_find_their_questions(tmp_path) -> None:
    with batch_serving(echo) as server:
        server.polls = 3
        runs = Runs(server, tmp_path)
        check(server, runs, runs.ask())
        again = runs.ask()
    assert len(server.batches) == 1
    assert all(answer.reply is not None for answer in again)
    assert any("12 requests" in line for line in runs.notices.said)


def _twice(number: int, lines: list) -> tuple[str, list]:
    return "completed", [*lines, *lines[:5], {**lines[0], "custom_id": "foreign"}]


def _partial(number: int, lines: list) -> tuple[str, list]:
    return "completed", lines[:7] if number == 0 else lines


def _expired(number: int, lines: list) -> tuple[str, list]:
    gone = [{**line, "response": None, "error": {"code": "batch_expired", "message": "expired"}} for line in lines[5:]]
    return ("expired", lines[:5] + gone) if number == 0 else shuffled(number, lines)


def _cancelled(number: int, lines: list) -> tuple[str, list]:
    return ("cancelled", []) if number == 0 else shuffled(number, lines)


def _some_refused(number: int, lines: list) -> tuple[str, list]:
    for line in lines[:4] if number == 0 else []:
        line["response"] = {"status_code": 429, "request_id": "", "body": {"error": {"message": "slow down"}}}
    return "completed", lines


@pytest.mark.parametrize(
    ("spoil", "batches"),
    [(_twice, 1), (_partial, 2), (_expired, 2), (_cancelled, 2), (_some_refused, 2)],
    ids=["said twice", "lines missing", "expired", "cancelled", "429 lines"],
)
def test_what_a_batch_does_not_answer_is_asked_again_and_nothing_else(spoil: Callable, batches: int, tmp_path) -> None:
    with batch_serving(echo) as server:
        server.spoil = spoil
        runs = Runs(server, tmp_path)
        check(server, runs, runs.ask())
    assert len(server.batches) == batches


def test_line_that_never_comes_fails_alone(tmp_path) -> None:
    with batch_serving(echo) as server:
        server.spoil = lambda _, lines: ("completed", [x for x in lines if x["custom_id"] != REQUESTS[3].key()])
        answers = Runs(server, tmp_path, max_retries=2).ask()
    assert [n for n, answer in enumerate(answers) if answer.reply is None] == [3]
    assert "without it, 3 times" in answers[3].reason
    assert len(server.batches) == 3


def test_refused_line_fails_alone_and_an_option_is_learnt(tmp_path) -> None:
    def respond(body: dict[str, object], number: int) -> str | Fault:
        if "max_tokens" in body:
            return Fault(400, error={"message": "use max_completion_tokens", "code": "unsupported_parameter"})
        too_long = body["messages"][1]["content"] == "question 2"  # type: ignore[index]
        return Fault(400, error={"code": "context_length_exceeded"}) if too_long else echo(body, number)

    with batch_serving(respond) as server:
        answers = Runs(server, tmp_path).ask()
    assert [n for n, answer in enumerate(answers) if answer.reply is None] == [2]
    assert len(server.batches) == 2


def test_many_requests_make_several_batches(tmp_path) -> None:
    with batch_serving(echo) as server:
        runs = Runs(server, tmp_path, max_requests_in_batch=5)
        check(server, runs, runs.ask())
    assert [len(batch.lines) for batch in server.batches] == [5, 5, 2]


def test_full_queue_makes_smaller_batches(tmp_path) -> None:
    with batch_serving(echo) as server:
        server.refuse = lambda batch: {"code": "token_limit_exceeded", "message": ""} if len(batch.lines) > 4 else None
        runs = Runs(server, tmp_path)
        check(server, runs, runs.ask())
    assert [len(batch.lines) for batch in server.batches] == [12, 6, 6, 3, 3, 3, 3]


def test_batch_waits_for_room_while_another_is_in_the_queue(tmp_path) -> None:
    full = {"code": "token_limit_exceeded", "message": ""}
    with batch_serving(echo) as server:
        server.polls = 3
        server.refuse = lambda _: full if any(b.status == "in_progress" for b in server.batches[:-1]) else None
        runs = Runs(server, tmp_path, max_requests_in_batch=5)
        check(server, runs, runs.ask())
    assert sorted({len(batch.lines) for batch in server.batches}) == [2, 5]


@pytest.mark.parametrize(
    "error",
    [{"code": "invalid_model", "message": "no such model"}, {"code": "token_limit_exceeded", "message": "at all"}],
    ids=["model", "queue full for one"],
)
def test_refused_batch_ends_the_run_and_charges_nothing(error: dict[str, object], tmp_path) -> None:
    with batch_serving(echo) as server:
        server.refuse = lambda _: error
        runs = Runs(server, tmp_path)
        with pytest.raises(LabelerError, match=f"batch_\\d+ was refused: {error['code']}"):
            runs.ask()
        server.refuse = lambda _: None
        check(server, runs, runs.ask())


def test_no_credit_ends_the_run_after_what_is_paid_is_kept(tmp_path) -> None:
    poor = Fault(429, error={"code": "insufficient_quota", "message": "no credit"})
    with batch_serving(lambda body, n: poor if n in {0, 5} else echo(body, n)) as server:
        runs = Runs(server, tmp_path)
        with pytest.raises(LabelerError, match="no credit left"):
            runs.ask()
        assert len(server.charged) == NUM - 2
        check(server, runs, runs.ask())


def test_creation_whose_answer_was_lost_is_not_repeated(tmp_path) -> None:
    with batch_serving(echo) as server:
        server.drop_created = 1
        runs = Runs(server, tmp_path)
        check(server, runs, runs.ask())
    assert len(server.batches) == 1


@pytest.mark.parametrize(
    ("call", "num_batches"),
    [
        ("POST /files", 1),
        ("POST /batches", 1),
        ("GET /batches/batch_0", 1),
        ("GET /files/result-0-output/content", 1),
    ],
)
@pytest.mark.parametrize(
    "fault",
    [Fault(429), Fault(500, body="<html>", headers={"Content-Type": "text/html"}), Fault(body="{}", reset_after=1)],
    ids=["429", "500", "reset"],
)
def test_fault_of_any_call_is_borne(call: str, num_batches: int, fault: Fault, tmp_path) -> None:
    with batch_serving(echo) as server:
        server.faults = [(call, fault)] * 2
        runs = Runs(server, tmp_path)
        check(server, runs, runs.ask())
    assert server.faults == []
    assert len(server.batches) == num_batches


@pytest.mark.parametrize(
    "call",
    ["POST /files", "POST /batches", "GET /batches/batch_0", "GET /files/result-0-output/content"],
)
def test_run_stopped_at_any_call_is_taken_up_again_without_paying_twice(call: str, tmp_path) -> None:
    with batch_serving(echo) as server:
        server.faults = [(call, Fault(401))]
        runs = Runs(server, tmp_path)
        with pytest.raises(LabelerError, match="check the key"):
            runs.ask()
        check(server, runs, runs.ask())
    assert len(server.batches) == 1


def test_kill_between_creating_a_batch_and_noting_it_finds_it_again(tmp_path, monkeypatch) -> None:
    def killed(self: Ledger, tag: str, name: str) -> None:
        raise KeyboardInterrupt

    with batch_serving(echo) as server:
        runs = Runs(server, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "name_batch", killed)
            with pytest.raises(KeyboardInterrupt):
                runs.ask()
        assert len(server.batches) == 1
        check(server, runs, runs.ask())
    assert len(server.batches) == 1
    assert any("taken up again, 12 requests" in line for line in runs.notices.said)


def test_answers_of_an_open_batch_are_kept_for_questions_of_later(tmp_path) -> None:
    with batch_serving(echo) as server:
        server.faults = [("GET /batches/batch_0", Fault(401))]
        runs = Runs(server, tmp_path)
        with pytest.raises(LabelerError):
            runs.ask()
        runs.ask(REQUESTS[:2])
        check(server, runs, runs.ask())
    assert len(server.batches) == 1


def test_cap_counts_what_is_in_batches_and_is_used_up(tmp_path) -> None:
    with batch_serving(echo) as server:
        # Each may take 106 tokens and takes 110.
        runs = Runs(server, tmp_path, max_tokens=660)
        with pytest.raises(SpentError, match="660"):
            runs.ask()
    assert len(server.charged) >= 5
    assert sum(map(sum, server.charged)) <= 660
    assert len(server.batches) >= 1
