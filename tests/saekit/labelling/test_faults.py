"""Features through a server with every fault: each ends once, labelled or failed with its reason, and the books agree."""

import json
import random

import pytest

from saekit.errors import LabelerError
from saekit.labelling import Answer, ChatRequest, LabellingModel, Ledger, LLMConfig, ask_in_rounds
from saekit.labelling.answers import UnusableAnswerError, parse_object
from saekit.labelling.live import OpenAIChat
from tests.saekit.labelling.stub import Fault, Responder, StubServer, completion, serving
from tests.saekit.labelling.test_client import Notices

NUM = 24
HTML = Fault(502, headers={"Content-Type": "text/html"}, body="<html><h1>Bad Gateway</h1></html>")


def good(body: dict[str, object]) -> str:
    return json.dumps({"label": "names " + str(body["messages"][1]["content"]).split()[1]})  # type: ignore[index]


def choice(**changes: object) -> dict[str, object]:
    """A completion whose choice or message differs."""
    answer = completion("")
    first = answer["choices"][0]  # type: ignore[index]
    for key, value in changes.items():
        (first["message"] if key in {"content", "refusal"} else first)[key] = value
    return answer


class Lab:
    """Features of which each is one question; keeps how every one ended."""

    def __init__(self, server: StubServer, **options: object) -> None:
        values = {"model": "m", "base_url": server.url, "wait_seconds": 0.001, "max_wait_seconds": 0.01}
        values |= {"timeout_seconds": 30.0, "concurrency": 8, "max_retries": 3, "price_input": 1.0, "price_output": 2.0}
        self.config = LLMConfig.model_validate(values | options)
        self.client = OpenAIChat(self.config)
        self.ledger = Ledger(":memory:")
        self.notices = Notices()
        self.ended: dict[int, str] = {}
        self.num_ended = 0

    def run(self, num: int = NUM) -> "Lab":
        model = LabellingModel(self.client, self.ledger, self.config, progress=self.notices)
        ask_in_rounds(model, range(num), request=self._request, take=self._take, attempts=2)
        return self

    def _request(self, feature: int, attempt: int) -> ChatRequest:
        return ChatRequest(
            model="m",
            system="name it",
            user=f"feature {feature} .",
            schema_name="s",
            schema={"type": "object"},
            temperature=0.0,
            max_output_tokens=50,
            attempt=attempt,
            purpose="explain",
            feature=feature,
        )

    def _take(self, feature: int, answers: list[Answer], is_last: bool) -> bool:
        reply = answers[-1].reply
        outcome = f"failed: {answers[-1].reason}"
        if reply is not None:
            try:
                outcome = str(parse_object(reply.text, needs="label")["label"])
            except UnusableAnswerError as error:
                if not is_last:
                    return False
                outcome = f"failed: {error}"
        self.num_ended += 1
        self.ended[feature] = outcome
        return True

    def done(self) -> list[int]:
        return sorted(feature for feature, outcome in self.ended.items() if outcome == f"names {feature}")

    def check_books(self, server: StubServer, num: int = NUM) -> None:
        """Each feature ended once; what the ledger counts is what the server charged."""
        assert sorted(self.ended) == list(range(num))
        assert self.num_ended == num
        assert all(outcome.startswith(("names ", "failed: ")) for outcome in self.ended.values())
        ledger = self.ledger
        charged = [sum(side) for side in zip(*server.charged, strict=True)] or [0, 0]
        assert [ledger.answered.input + ledger.wasted.input, ledger.answered.output + ledger.wasted.output] == charged
        assert ledger.answered.cost + ledger.wasted.cost == pytest.approx((charged[0] + 2 * charged[1]) / 1e6)
        assert ledger.num_sent == len(server.requests)
        assert ledger.open.requests == 0


def once(fault: "Fault | dict[str, object] | str") -> Responder:
    """The first time that a feature is asked about, the fault; then the good answer."""
    seen: set[str] = set()

    def respond(body: dict[str, object], _: int) -> "Fault | dict[str, object] | str":
        user = str(body["messages"][1]["content"])  # type: ignore[index]
        if user in seen:
            return good(body)
        seen.add(user)
        return fault

    return respond


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429),
        Fault(429, headers={"Retry-After": "0.01"}),
        Fault(429, headers={"retry-after-ms": "5"}),
        Fault(429, headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "10ms"}),
        Fault(500, headers={"Content-Type": "text/html"}, body="<html>"),
        HTML,
        Fault(503),
        Fault(408),
        Fault(529),
        Fault(200, body=json.dumps(completion("x")), reset_after=60),
        choice(content=None),
        choice(content=None, refusal="I cannot."),
        choice(content='{"label": "na', finish_reason="length"),
        choice(content='{"label": NaN}'),
        choice(content='{"labels": ["x"]}'),
        choice(content="Der Name ist Fluss."),
        {**completion(""), "choices": []},
        {"object": "chat.completion", "usage": {"prompt_tokens": 7, "completion_tokens": 0}},
    ],
    ids=[
        *(
            "429",
            "429 retry-after",
            "429 retry-after-ms",
            "429 rate headers",
            "500 html",
            "502 html",
            "503",
            "408",
            "529",
        ),
        *("reset", "null", "refusal", "truncated", "nan", "wrong key", "prose", "no choices", "no choices, usage"),
    ],
)
def test_fault_at_every_first_try_costs_no_feature(fault: "Fault | dict[str, object]") -> None:
    with serving(once(fault)) as server:
        lab = Lab(server).run(8)
    assert lab.done() == list(range(8))
    lab.check_books(server, 8)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(500), "500"),
        (Fault(400, error={"message": "bad"}), "400 bad"),
        (Fault(400, error={"code": "context_length_exceeded"}), "400"),
        (Fault(403, error={"message": "flagged by moderation"}), "flagged"),
        (Fault(200, body=json.dumps(completion("x")), reset_after=9), "connection lost"),
        (choice(content=None), "empty answer"),
        (choice(content="no"), "no JSON object"),
        ({**completion(""), "choices": []}, "no completion"),
    ],
    ids=["500", "400", "too long", "moderation", "reset", "null", "prose", "no choices"],
)
def test_feature_whose_fault_stays_fails_alone_with_its_reason(fault: "Fault | dict[str, object]", reason: str) -> None:
    def respond(body: dict[str, object], _: int) -> "Fault | dict[str, object] | str":
        return fault if "feature 3 ." in str(body["messages"][1]["content"]) else good(body)  # type: ignore[index]

    with serving(respond) as server:
        lab = Lab(server, max_retries=1).run(6)
    assert lab.done() == [0, 1, 2, 4, 5]
    assert reason in lab.ended[3]
    lab.check_books(server, 6)


@pytest.mark.parametrize(
    "fault",
    [Fault(200, body="{", hang_seconds=3.0), Fault(200, body=json.dumps(completion("x")), drip_seconds=0.05)],
    ids=["silence", "slow-loris"],
)
def test_answer_that_does_not_come_in_time_fails_alone_and_counts_as_spent(fault: Fault) -> None:
    def respond(body: dict[str, object], _: int) -> Fault | str:
        return fault if "feature 3 ." in str(body["messages"][1]["content"]) else good(body)  # type: ignore[index]

    with serving(respond) as server:
        # Others have so many tries that a slow machine does not matter.
        lab = Lab(server, timeout_seconds=0.4, max_retries=4, concurrency=2).run(5)
    assert lab.done() == [0, 1, 2, 4]
    assert "no answer within 0.4 s" in lab.ended[3]
    assert lab.ledger.lost.requests >= 5
    assert lab.ledger.open.requests == 0


def test_storm_of_everything_leaves_books_that_agree() -> None:
    generator = random.Random(0)
    faults = [
        Fault(429),
        Fault(429, headers={"Retry-After": "0.01"}),
        HTML,
        Fault(500),
        Fault(503),
        choice(content=None),
    ]
    faults += [
        choice(content="prose"),
        choice(refusal="no", content=None),
        Fault(body=json.dumps(completion("x")), reset_after=9),
    ]

    def respond(body: dict[str, object], _: int) -> "Fault | dict[str, object] | str":
        return generator.choice(faults) if generator.random() < 0.5 else good(body)

    with serving(respond) as server:
        lab = Lab(server, concurrency=16, max_retries=8).run(60)
    lab.check_books(server, 60)
    assert len(lab.done()) > 30


def test_rate_limit_of_the_server_is_found_and_kept() -> None:
    def respond(body: dict[str, object], _: int) -> Fault | str:
        return Fault(429) if server.most_now() > 3 else good(body)

    class Counting(StubServer):
        def most_now(self) -> int:
            return self._inside

    server = Counting(respond)
    server.start()
    try:
        lab = Lab(server, concurrency=64).run(80)
    finally:
        server.stop()
    assert lab.done() == list(range(80))
    lab.check_books(server, 80)
    assert lab.client._pace.limit < 20


def test_server_that_answers_nobody_ends_the_run() -> None:
    with serving(lambda *_: Fault(500)) as server:
        lab = Lab(server, max_retries=0, give_up_after=5)
        with pytest.raises(LabelerError, match="5 requests in a row got no answer"):
            lab.run(60)
    assert len(lab.ended) < 5 + 8


@pytest.mark.parametrize(
    "fault",
    [Fault(401), Fault(402), Fault(429, error={"code": "insufficient_quota"}), Fault(404)],
    ids=["401", "402", "quota", "404"],
)
def test_hopeless_answer_in_the_middle_stops_at_once_and_keeps_what_is_paid(fault: Fault) -> None:
    with serving(lambda body, number: fault if number >= 10 else good(body)) as server:
        lab = Lab(server, concurrency=4)
        with pytest.raises(LabelerError):
            lab.run(60)
    assert len(server.requests) <= 10 + 4
    assert lab.ledger.answered.requests == len(server.charged) == len(lab.done()) == 10


def test_features_whose_requests_are_cut_short_are_not_failed() -> None:
    is_bad = False

    def respond(body: dict[str, object], _: int) -> Fault | str:
        if not is_bad:
            return good(body)
        is_first = "feature 1 ." in str(body["messages"][1]["content"])  # type: ignore[index]
        return Fault(401) if is_first else Fault(500, hang_seconds=0.5)

    with serving(respond) as server:
        lab = Lab(server, concurrency=8)
        lab.run(1)
        is_bad = True
        with pytest.raises(LabelerError, match="check the key"):
            lab.run(8)
        assert list(lab.ended) == [0]
        is_bad = False
        lab.run(8)
    assert lab.done() == list(range(8))


def test_cap_counts_what_a_killed_run_may_have_been_charged() -> None:
    with serving(lambda body, _: good(body)) as server:
        lab = Lab(server, max_cost=0.0015)
        lab.ledger.send(lab._request(99, 0), (1000, 200))
        with pytest.raises(LabelerError, match="could pass max_cost"):
            lab.run(8)
    # The lost request may have cost 0.0014, each new one may cost 0.000153 and costs 0.00012.
    assert server.requests == []
    assert "1 requests were on their way" in lab.notices.said[0]


def test_schema_that_is_not_supported_is_said_once() -> None:
    def respond(body: dict[str, object], _: int) -> Fault | str:
        kind = body.get("response_format", {"type": "none"})["type"]  # type: ignore[attr-defined]
        return Fault(400, error={"message": "unknown response_format"}) if kind != "none" else good(body)

    with serving(respond) as server:
        lab = Lab(server).run()
    assert lab.done() == list(range(NUM))
    assert [line for line in lab.notices.said if "json_schema" in line] == lab.notices.said
    assert len(lab.notices.said) == 1


def test_two_options_refused_to_many_at_once_are_both_changed() -> None:
    def respond(body: dict[str, object], _: int) -> Fault | str:
        for key, word in (("max_tokens", "max_completion_tokens"), ("temperature", "temperature")):
            if key in body:
                return Fault(400, error={"message": f"unsupported: {key}; {word}"})
        return good(body)

    with serving(respond) as server:
        lab = Lab(server).run()
    assert lab.done() == list(range(NUM))
    assert all(body["response_format"]["type"] == "json_schema" for body in server.requests)  # type: ignore[index]
