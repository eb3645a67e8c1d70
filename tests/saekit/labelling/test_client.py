"""The OpenAI client against a server with faults: what is repeated, what is given up, what ends the run."""

import builtins
import dataclasses
import datetime
import email.utils
import json

import pytest

from saekit.errors import ConfigError, LabelerError, MissingDependencyError
from saekit.labelling import Answer, ChatReply, ChatRequest, LabellingModel, Ledger, LLMConfig
from saekit.labelling.dialect import retry_after
from saekit.labelling.live import OpenAIChat
from tests.saekit.labelling.stub import Fault, StubServer, completion, serving

GOOD = '{"label": "rivers"}'
REQUEST = ChatRequest(
    model="m",
    system="fixed",
    user="varying",
    schema_name="s",
    schema={"type": "object"},
    temperature=0.0,
    max_output_tokens=50,
)


class Notices:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def task(self, *_: object, **__: object) -> object:
        raise AssertionError("asking draws no bars")

    def say(self, message: str) -> None:
        self.said.append(message)


def model_at(server: StubServer, *, notices: Notices | None = None, **options: object) -> LabellingModel:
    values = {"model": "m", "base_url": server.url, "wait_seconds": 0.001, "max_wait_seconds": 0.01} | options
    config = LLMConfig.model_validate(values)
    return LabellingModel(OpenAIChat(config), Ledger(":memory:"), config, progress=notices or Notices())


def numbered(times: int) -> list[ChatRequest]:
    return [dataclasses.replace(REQUEST, attempt=number) for number in range(times)]


def ask_all(server: StubServer, times: int = 1, **options: object) -> list[Answer]:
    """One request after the other."""
    model = model_at(server, **options)
    return [model.ask([request])[0] for request in numbered(times)]


def ask(server: StubServer, times: int = 1, **options: object) -> list[ChatReply]:
    answers = ask_all(server, times, **options)
    assert all(answer.reply is not None for answer in answers), [answer.reason for answer in answers]
    return [answer.reply for answer in answers if answer.reply is not None]


def _first(fault: Fault, then: str = GOOD):
    return lambda _, number: fault if number == 0 else then


HTML = "<html><body>Bad Gateway</body></html>"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429),
        Fault(429, headers={"Retry-After": "0.05"}),
        Fault(500, headers={"Content-Type": "text/html"}, body=HTML),
        Fault(502, headers={"Content-Type": "text/html"}, body=HTML),
        Fault(503),
        Fault(408),
        Fault(200, headers={"Content-Type": "text/html"}, body=HTML),
        Fault(200, body=json.dumps(completion("x"))[:60]),
        Fault(200, body=json.dumps({"id": "1", "object": "chat.completion", "choices": []})),
        Fault(200, body="[1, 2]"),
        Fault(200, body=json.dumps(completion("x")), reset_after=50),
    ],
    ids=[
        *("429", "429 retry-after", "500 html", "502 html", "503", "408", "200 html", "truncated body", "no choices"),
        *("no object", "reset mid-body"),
    ],
)
def test_passing_fault_is_repeated(fault: Fault) -> None:
    with serving(_first(fault)) as server:
        (reply,) = ask(server)
    assert (reply.text, reply.input_tokens, reply.output_tokens) == (GOOD, 100, 10)
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [{"drip_seconds": 0.02}, {"hang_seconds": 1.0}], ids=["slow-loris", "silence"])
def test_slow_answer_is_repeated(fault: dict[str, float]) -> None:
    with serving(_first(Fault(200, body=json.dumps(completion("x")), **fault))) as server:  # type: ignore[arg-type]
        (reply,) = ask(server, timeout_seconds=0.5)
    assert reply.text == GOOD
    assert len(server.requests) >= 2


def test_truncated_connection_is_repeated() -> None:
    with serving(_first(Fault(200, headers={"Content-Length": "5000", "Connection": "close"}, body="{"))) as server:
        (reply,) = ask(server, timeout_seconds=1.0)
    assert reply.text == GOOD


def test_rate_limits_do_not_count_as_failures() -> None:
    with serving(lambda _, number: Fault(429) if number < 30 else GOOD) as server:
        (reply,) = ask(server, max_retries=0)
    assert reply.text == GOOD
    assert len(server.requests) == 31


def test_server_errors_are_given_up_after_max_retries() -> None:
    with serving(lambda _, number: GOOD if number == 0 else Fault(500)) as server:
        answers = ask_all(server, times=2, max_retries=3)
    assert answers[1].reply is None
    assert "500" in answers[1].reason
    assert len(server.requests) == 1 + 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(401), "check the key"),
        (Fault(403), "check the key"),
        (Fault(402), "no credit"),
        (Fault(404), "check model and base_url"),
        (Fault(429, error={"code": "insufficient_quota"}), "no credit"),
    ],
    ids=["401", "403", "402", "404", "quota"],
)
def test_hopeless_answer_ends_the_run_at_once(fault: Fault, message: str) -> None:
    with serving(lambda _, __: fault) as server, pytest.raises(LabelerError, match=message):
        ask(server)
    assert len(server.requests) == 1


def test_no_connection_ends_the_run() -> None:
    with serving(lambda *_: GOOD) as server:
        pass
    with pytest.raises(LabelerError, match="no connection"):
        ask(server, max_retries=1)


def _formats(server: StubServer) -> list[str]:
    return [request.get("response_format", {"type": "none"})["type"] for request in server.requests]  # type: ignore[attr-defined]


@pytest.mark.parametrize("status", [400, 422, 500])
@pytest.mark.parametrize("refused", [{"json_schema"}, {"json_schema", "json_object"}], ids=["schema", "all formats"])
def test_refused_answer_format_falls_back_and_is_remembered(status: int, refused: set[str]) -> None:
    def respond(body: dict[str, object], _: int) -> str | Fault:
        kind = body.get("response_format", {"type": "none"})["type"]  # type: ignore[attr-defined]
        return Fault(status) if kind in refused else GOOD

    with serving(respond) as server:
        replies = ask(server, times=2, max_retries=4)
    assert [reply.text for reply in replies] == [GOOD, GOOD]
    final = "json_object" if len(refused) == 1 else "none"
    assert _formats(server)[-2:] == [final, final]
    assert _formats(server)[0] == "json_schema"
    # A refusal is tried once; a 500 could have been an accident and is borne twice more.
    assert len(server.requests) == 2 + len(refused) * (3 if status == 500 else 1)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens"),
        ("Unsupported value: 'temperature' does not support 0 with this model.", "temperature"),
    ],
    ids=["max_tokens", "temperature"],
)
def test_refused_option_is_changed(message: str, key: str) -> None:
    def respond(body: dict[str, object], _: int) -> str | Fault:
        return Fault(400, error={"message": message}) if key in body else GOOD

    with serving(respond) as server:
        replies = ask(server, times=2)
    assert [reply.text for reply in replies] == [GOOD, GOOD]
    assert len(server.requests) == 3
    assert _formats(server) == ["json_schema"] * 3


def test_request_that_stays_refused_fails_alone() -> None:
    refusal = Fault(400, error={"message": "context length exceeded"})
    with serving(lambda *_: refusal) as server:
        (answer,) = ask_all(server)
    assert "400 context length exceeded" in answer.reason
    # No plainer format would make it shorter.
    assert len(server.requests) == 1


@pytest.mark.parametrize("content", [None, ""], ids=["null", "empty"])
def test_missing_content_is_an_empty_text(content: str | None) -> None:
    answer = completion("x")
    answer["choices"][0]["message"]["content"] = content  # type: ignore[index]
    with serving(lambda *_: answer) as server:
        (reply,) = ask(server)
    assert reply.text == ""


def test_missing_usage_is_estimated() -> None:
    answer = completion(GOOD)
    del answer["usage"]
    with serving(lambda *_: answer) as server:
        (reply,) = ask(server)
    assert reply.is_estimated
    assert reply.input_tokens >= len("fixedvarying") / 3
    assert reply.output_tokens >= len(GOOD) / 4


def test_fixed_part_of_the_prompt_comes_first() -> None:
    with serving(lambda *_: GOOD) as server:
        ask(server)
    (request,) = server.requests
    assert request["messages"] == [
        {"role": "system", "content": "fixed"},
        {"role": "user", "content": "varying"},
    ]
    assert request["model"] == "m"
    assert request["max_tokens"] == 50


def test_retry_after_is_waited_for() -> None:
    import time

    with serving(_first(Fault(429, headers={"Retry-After": "0.4"}))) as server:
        started = time.monotonic()
        ask(server, max_wait_seconds=0.1)
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("", None), ("soon", None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0)],
)
def test_retry_after_header_is_read(value: str | None, seconds: float | None) -> None:
    assert retry_after({} if value is None else {"retry-after": value}) == seconds


def test_retry_after_date_is_read() -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    assert 25 < (retry_after({"retry-after": email.utils.format_datetime(later, usegmt=True)}) or 0) <= 30


def test_key_is_needed_where_the_server_is_openai(monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="no key in the environment variable OPENAI_API_KEY"):
        OpenAIChat(LLMConfig(model="m"))


@pytest.mark.parametrize("package", ["openai", "stamina"])
def test_missing_package_names_the_extra(monkeypatch, package: str) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == package:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*pip install 'saekit\[llm\]'"):
        OpenAIChat(LLMConfig(model="m", base_url="http://127.0.0.1:1/v1"))
