"""What each kind of explanation is made from, and what its labels carry."""

import json

import numpy as np
import pytest

from saekit.errors import ConfigError
from saekit.labelling import Answer, ChatReply, Label, LLMConfig, TokenEffects
from saekit.labelling.explain import joined_label, llm_labeler
from tests.saekit.labelling.bench import FIRING, Bench
from tests.saekit.labelling.planted import ID, World
from tests.saekit.labelling.stub import serving

KINDS = ("input", "vocabproj", "tokenchange", "raw", "concat")


def effects_of(kind: str, more: str, less: str) -> TokenEffects:
    """Effects of features 0 to 3: the same for all."""
    ids = np.full((4, 1), ID[more], dtype=np.int64), np.full((4, 1), ID[less], dtype=np.int64)
    values = np.ones((4, 1), dtype=np.float32)
    return TokenEffects(
        kind,  # type: ignore[arg-type]
        np.arange(4),
        promoted_ids=ids[0],
        promoted_values=values,
        suppressed_ids=ids[1],
        suppressed_values=-values,
    )


CHANGED, PROJECTED = effects_of("tokenchange", " war", " peace"), effects_of("vocabproj", " song", " army")


def some_effects(feature: int) -> list[TokenEffects]:
    return [found for found in (CHANGED, PROJECTED) if found.promoted(feature)]


@pytest.fixture
def lab(bench) -> Bench:
    return bench(explainers=KINDS, effects=some_effects, price_input=1.0, price_output=2.0)


def answering(body: dict[str, object], _: int) -> str:
    """Says which evidence it has seen."""
    user = str(body["messages"][1]["content"])  # type: ignore[index]
    seen = [
        name
        for name, word in (("texts", "Strongest"), ("turned", "Turned up"), ("weights", "By its output"))
        if word in user
    ]
    label = "+".join(seen)
    values = {"label": label, "fires_on": f"f {label}", "promotes": f"p {label}", "suppresses": "", "confidence": 0.5}
    return json.dumps({**values, "description": f"long {label}", "examples": [2, 1, 2, 99, "3", None]})


def test_each_kind_sees_its_evidence_and_names_itself(lab: Bench) -> None:
    lab.judge = None
    with serving(answering) as server:
        ledger = lab.run(server, [0, 4])
    found = {(label.feature, label.evidence): label for label in lab.labels.records}
    assert {key: label.label for key, label in found.items()} == {
        (0, "input"): "texts",
        (0, "vocabproj"): "weights",
        (0, "tokenchange"): "turned",
        (0, "raw"): "texts+turned+weights",
        (0, "concat"): "weights / texts / turned",
        # Steering and projection were only done for the first four.
        (4, "input"): "texts",
        (4, "raw"): "texts",
        (4, "concat"): "texts",
    }
    # Where there is nothing but texts, `raw` and `input` are one question.
    assert len(server.requests) == ledger.num_sent == 5
    raw, joined = found[0, "raw"], found[0, "concat"]
    assert (raw.labeler, joined.labeler) == ("llm:stub", "llm:stub:concat")
    assert joined.description == "long weights\nlong texts\nlong turned"
    assert (joined.fires_on, joined.promotes, joined.prompt_version) == (
        "f texts",
        "p turned",
        "explain_output_v1+explain_v2",
    )
    assert (joined.input_tokens, joined.cost) == (300, pytest.approx(3 * raw.cost))
    assert raw.cost == pytest.approx(120e-6)
    assert (raw.description, raw.prompt_version, raw.model) == ("long texts+turned+weights", "explain_v2", "stub")


def test_order_and_sign_of_tokens_are_kept(lab: Bench) -> None:
    user = lab.explainers[2].request(0).user
    assert user.splitlines() == [
        'Turned up in the model, makes more likely: "war"',
        'Turned up in the model, makes less likely: "peace"',
    ]


def test_fixed_part_is_first_and_the_same_for_all_features(lab: Bench) -> None:
    for explainer in lab.explainers:
        requests = [explainer.request(feature) for feature in FIRING if explainer.has_evidence(feature)]
        assert len({request.system for request in requests}) == 1
        assert len({request.user for request in requests}) == (
            1 if explainer.kind in {"vocabproj", "tokenchange"} else 10
        )


def test_feature_without_evidence_is_no_question(lab: Bench, world: World) -> None:
    dead = world.feature("dead")
    assert not any(explainer.has_evidence(dead) for explainer in lab.explainers)
    assert lab.explainers[1].documents_shown(0) == set()


def test_examples_are_places_of_the_store(lab: Bench, world: World) -> None:
    lab.judge = None
    with serving(answering) as server:
        lab.run(server, [world.feature("river")])
    label = next(label for label in lab.labels.records if label.evidence == "input")
    assert len(label.examples) == 3
    words = [world.store.tokens().reshape(-1)[place] for place in label.examples]
    assert set(words) <= {ID[" river"], ID[" River"], ID[" lake"]}
    contexts = lab.contexts.feature(world.feature("river"))
    assert label.examples[1] == contexts[0].row * 64 + contexts[0].position


def test_numbers_run_through_both_lists(lab: Bench) -> None:
    lines = [line for line in lab.explainer.request(0).user.splitlines() if line[:1].isdigit()]
    assert [int(line.partition(".")[0]) for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > 10


def test_join_of_nothing_fails_with_its_reason() -> None:
    failed = Label(feature=3, labeler="llm:m:input", evidence="input", status="failed", reason="x", cost=0.5)
    label = joined_label(3, [failed], LLMConfig(model="m"))
    assert (label.status, label.reason, label.cost) == ("failed", "none of its parts is labelled", 0.5)


def test_second_attempt_asks_for_plain_json(lab: Bench) -> None:
    first, again = lab.explainer.request(0), lab.explainer.request(0, attempt=1)
    assert again.user.startswith(first.user)
    assert "JSON object alone" in again.user
    assert again.max_output_tokens == 2 * first.max_output_tokens


def test_refusal_of_the_last_attempt_is_the_reason(lab: Bench) -> None:
    reply = ChatReply(text="", finish_reason="stop", input_tokens=1, output_tokens=1, refusal="not  this")
    answers = [Answer(request=lab.explainer.request(0), reply=reply)]
    assert lab.explainer.label(0, answers, is_last=False) is None
    label = lab.explainer.label(0, answers, is_last=True)
    assert (label.status, label.reason) == ("failed", "the model would not answer: not this")


@pytest.mark.parametrize("kind", KINDS)
def test_labelers_differ_by_kind(kind: str) -> None:
    assert llm_labeler(LLMConfig(model="a:b"), kind) == ("llm:a:b" if kind == "raw" else f"llm:a:b:{kind}")  # type: ignore[arg-type]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="explainers"):
        LLMConfig.parse({"model": "m", "explainers": ["tokenchnage"]})
