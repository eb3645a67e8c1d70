"""A labelling model in the process: same answer alone and in a batch, seeds, stops and prompts that do not fit."""

import dataclasses

import pytest

from saekit.errors import ModelError
from saekit.labelling import Answer, ChatRequest, LabellingModel, Ledger, LLMConfig
from saekit.labelling.chat import SpentError
from saekit.labelling.local import LocalChat
from saekit.models import LanguageModel, load_model

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
REQUEST = ChatRequest(
    model="tiny",
    system="Name it.",
    user="the river",
    schema_name="s",
    schema={},
    temperature=0.0,
    max_output_tokens=16,
)
TEXTS = ("the river", "the old town and the mill", "moon", "a violin has four strings")


@pytest.fixture
def lm(tiny_model_dir) -> LanguageModel:
    lm = load_model(str(tiny_model_dir("llama")))
    lm.tokenizer.chat_template = TEMPLATE  # type: ignore[attr-defined]
    return lm


def ask(lm: LanguageModel, requests: list[ChatRequest], **options: object) -> tuple[list[Answer], Ledger]:
    config = LLMConfig.parse({"model": "tiny", "backend": "local", **options})
    ledger = Ledger(":memory:")
    return LabellingModel(LocalChat(config, lm=lm), ledger, config).ask(requests), ledger


def texts_of(answers: list[Answer]) -> list[str]:
    return [answer.reply.text for answer in answers if answer.reply is not None]


def test_answers_do_not_depend_on_the_batch(lm: LanguageModel) -> None:
    requests = [dataclasses.replace(REQUEST, user=text) for text in TEXTS]
    alone, ledger = ask(lm, requests, local_batch=1)
    together, _ = ask(lm, requests, local_batch=3)
    assert texts_of(alone) == texts_of(together)
    assert all(texts_of(alone))
    assert [answer.request.user for answer in alone] == list(TEXTS)
    lengths = [len(lm.tokenizer(f"system: Name it.\nuser: {text}\nassistant:")["input_ids"]) for text in TEXTS]
    found = [answer.reply.input_tokens for answer in alone if answer.reply is not None]
    # The tokenizer puts its first token before a bare text, and the template puts none.
    assert found == [length - (lengths[0] - found[0]) for length in lengths]
    assert (ledger.answered.requests, ledger.open.requests) == (4, 0)


def test_samples_have_seeds_of_their_own(lm: LanguageModel) -> None:
    requests = [dataclasses.replace(REQUEST, temperature=1.0, attempt=attempt) for attempt in range(3)]
    first, _ = ask(lm, requests)
    again, _ = ask(lm, list(reversed(requests)))
    assert texts_of(first) == list(reversed(texts_of(again)))
    assert len(set(texts_of(first))) == 3
    other, _ = ask(lm, requests, seed=1)
    assert texts_of(other) != texts_of(first)


def test_answer_ends_at_the_end_of_a_turn_or_is_cut(lm: LanguageModel) -> None:
    (cut,), _ = ask(lm, [REQUEST])
    assert (cut.reply.finish_reason, cut.reply.output_tokens) == ("length", 16)
    client = LocalChat(LLMConfig(model="tiny", backend="local"), lm=lm)
    (written,) = client._written([REQUEST], [client._prompt(REQUEST)])
    lm.model.generation_config.eos_token_id = [written[0], 1]  # type: ignore[union-attr]
    (ended,), _ = ask(lm, [REQUEST])
    assert (ended.reply.finish_reason, ended.reply.output_tokens) == ("stop", 1)


def test_question_that_does_not_fit_fails_alone(lm: LanguageModel) -> None:
    answers, ledger = ask(lm, [REQUEST, dataclasses.replace(REQUEST, user="the river " * 60)])
    assert answers[0].reply is not None
    assert "longer than its context" in answers[1].reason
    assert (ledger.answered.requests, ledger.lost.requests, ledger.open.requests) == (1, 0, 0)


def test_template_without_a_system_turn_gets_one_turn(lm: LanguageModel) -> None:
    lm.tokenizer.chat_template = (  # type: ignore[attr-defined]
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    (answer,), _ = ask(lm, [REQUEST])
    assert answer.reply is not None


def test_cap_ends_after_what_fits(lm: LanguageModel) -> None:
    config = LLMConfig(model="tiny", backend="local", max_tokens=150)
    ledger = Ledger(":memory:")
    model = LabellingModel(LocalChat(config, lm=lm), ledger, config)
    with pytest.raises(SpentError):
        model.ask([dataclasses.replace(REQUEST, user=text) for text in TEXTS * 3])
    assert (ledger.answered.requests, ledger.open.requests) == (ledger.num_sent, 0)
    assert ledger.answered.requests >= 2
    assert ledger.answered.input + ledger.answered.output <= 150


def test_model_that_cannot_chat_is_refused(tiny_model_dir) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        LocalChat(LLMConfig(model=str(tiny_model_dir("llama")), backend="local"))
