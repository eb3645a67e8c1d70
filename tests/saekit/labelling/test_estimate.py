"""Prices and estimates: what is said before a run is what the ledger says after it."""

import dataclasses
import json

import pytest

from saekit.errors import ConfigError
from saekit.labelling import ChatReply, Ledger, LLMConfig
from saekit.labelling.estimate import estimate_requests, token_counter
from saekit.labelling.explain import USUAL_ANSWER
from saekit.labelling.prices import Prices, known_prices
from tests.saekit.labelling.bench import ANSWER, FIRING, oracle
from tests.saekit.labelling.planted import WordTokenizer
from tests.saekit.labelling.stub import completion, serving
from tests.saekit.labelling.test_client import REQUEST


def test_table_knows_models_their_snapshots_and_their_host() -> None:
    mini = Prices(input=0.40, cached_input=0.10, output=1.60, batch_factor=0.5)
    assert known_prices("gpt-4.1-mini", None) == mini
    assert known_prices("gpt-4.1-mini-2025-04-14", "https://api.openai.com/v1") == mini
    assert known_prices("gpt-4.1-mini", "http://localhost:8000/v1") is None
    assert known_prices("gpt-4.1-mini-large", None) is None


@pytest.mark.parametrize(
    ("values", "cost"),
    [
        ({"model": "gpt-4.1-mini"}, 0.40 * 0.9 + 0.10 * 0.1 + 1.60 * 2),
        ({"model": "gpt-4.1-mini", "backend": "batch"}, (0.40 * 0.9 + 0.10 * 0.1 + 1.60 * 2) / 2),
        ({"model": "gpt-4.1-mini", "price_input": 3.0, "price_output": 1.0}, 5.0),
        ({"model": "x", "price_input": 3.0, "price_output": 1.0, "price_cached_input": 1.0}, 4.8),
        ({"model": "x"}, None),
        ({"model": "gpt-4.1-mini", "backend": "local"}, None),
    ],
    ids=["table", "batch", "recipe first", "cached", "unknown", "local"],
)
def test_cost_is_of_the_right_prices(values: dict[str, object], cost: float | None) -> None:
    found = LLMConfig.parse(values).cost(1e6, 2e6, cached_tokens=1e5)
    assert found == (None if cost is None else pytest.approx(cost))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_cost": 1.0}, "max_cost needs price_input and price_output.*no model 'm' at OpenAI"),
        ({"price_input": 1.0}, "price_input and price_output go together"),
    ],
)
def test_half_a_price_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLMConfig.parse({"model": "m", **values})


def _charging(body: dict[str, object], number: int) -> dict[str, object]:
    """Counts tokens as another tokenizer would: pieces of at most six characters, and the marks of a chat."""
    answer = oracle(body, number)
    whole = completion(_usual() if answer == ANSWER else answer)
    text = "".join(str(message["content"]) for message in body["messages"])  # type: ignore[attr-defined]
    whole["usage"] = {"prompt_tokens": _pieces(text) + 11, "completion_tokens": _pieces(str(_said(whole)))}
    return whole


def _usual() -> str:
    """An answer of another length than the one that the estimate assumes."""
    return json.dumps(
        json.loads(USUAL_ANSWER) | {"fires_on": "Names of rivers, and of lakes where they stand before a town."}
    )


def _said(whole: dict[str, object]) -> object:
    return whole["choices"][0]["message"]["content"]  # type: ignore[index]


def _pieces(text: str) -> int:
    count = token_counter(WordTokenizer())
    return count(text) + sum(len(word) > 12 for word in text.split())


def test_estimate_is_within_a_tenth_of_what_the_ledger_says_afterwards(bench, world) -> None:
    lab = bench(num_judged=10, price_input=0.4, price_output=1.6)
    estimate = estimate_requests(lab.questions(FIRING).requests(), lab.config, count=token_counter(WordTokenizer()))
    with serving(_charging) as server:
        ledger = lab.run(server, FIRING)
    assert estimate.num_requests == len(server.requests)
    assert estimate.cost == pytest.approx(ledger.answered.cost, rel=0.1)
    assert estimate.input_tokens == pytest.approx(ledger.answered.input, rel=0.1)
    assert estimate.most_cost > ledger.answered.cost
    # Whoever is right by accident in dollars would be wrong here.
    assert estimate.input_tokens != ledger.answered.input


def test_estimate_learns_from_the_ledger_and_leaves_out_what_is_answered() -> None:
    requests = [
        dataclasses.replace(REQUEST, user="word " * 20 * n, purpose="p", usual_answer="a b c") for n in range(1, 21)
    ]
    config, count = LLMConfig(model="m"), token_counter(WordTokenizer())
    fresh = estimate_requests(requests, config, count=count)
    assert (fresh.num_requests, fresh.num_answered, fresh.output_tokens) == (20, 0, 60)
    assert fresh.most_output_tokens == 20 * 50
    ledger = Ledger(":memory:")
    for request in requests[:10]:
        ledger.send(request, (1, 1))
        size = count(request.system) + count(request.user) + 11
        reply = ChatReply(text="", finish_reason="stop", input_tokens=3 * size, output_tokens=40)
        ledger.record(request.key(), reply)
    taught = estimate_requests(requests, config, count=count, ledger=ledger)
    assert (taught.num_requests, taught.num_answered, taught.output_tokens) == (10, 10, 400)
    later = estimate_requests(requests[10:], config, count=count)
    assert taught.input_tokens == pytest.approx(3 * later.input_tokens, rel=0.01)
    assert "10 more are answered already" in str(taught)
