"""Surprisal: what the label saves, by servers that echo prompts, by a model in the process, and not at all by others."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from saekit.labelling import Label, LabellingModel, Ledger, LLMConfig
from saekit.labelling.chat import ChatReply
from saekit.labelling.live import OpenAIChat
from saekit.labelling.llm import answerable
from saekit.labelling.local import LocalChat
from saekit.labelling.logprobs import TokenLogprob, dump_logprobs, load_logprobs
from saekit.labelling.scoring.surprisal import MARK, text_logprob
from saekit.labelling.textreading import probe_request
from saekit.models import load_model, logits
from saekit.progress import Progress
from tests.saekit.labelling.bench import Bench
from tests.saekit.labelling.inprocess import InProcess
from tests.saekit.labelling.noisyoracle import PATTERNS, UNRELATED, describe
from tests.saekit.labelling.simulator import Simulating
from tests.saekit.labelling.stub import serving

MakeBench = Callable[..., Bench]
NAMES = ("river", "digit")


def surprised(world, lab: Bench, oracle: Simulating, labels: dict[str, str]):
    features = [world.feature(name) for name in labels]
    lab.labels.extend(
        Label(feature=feature, labeler="llm:stub", label=label)
        for feature, label in zip(features, labels.values(), strict=True)
    )
    server = InProcess(oracle)
    lab.run(server, features).close()
    return {world.names[score.feature]: score for score in lab.scores.records}, server


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_noisy_reader_scores_its_closed_form(world, bench: MakeBench, flip: float) -> None:
    lab = bench(num_judged=14, scorers=["surprisal"], concurrency=1)
    scores, server = surprised(world, lab, Simulating(flip), {name: describe(PATTERNS[name]) for name in NAMES})
    for score in scores.values():
        assert (score.judge, score.prompt_version, score.base_rate) == ("stub", "surprisal_v1", 0.5)
        assert score.low <= score.f1 <= score.high
    if flip == 0:
        for score in scores.values():
            assert (score.auprc, score.auprc_natural) == (pytest.approx(1.0), pytest.approx(1.0))
            # The bar is that of the other half, and gains differ from text to text.
            assert score.f1 > 0.7
            assert score.gain > 0.3
    else:
        assert np.mean([score.auprc for score in scores.values()]) == pytest.approx(0.5, abs=0.2)
        assert np.mean([score.gain for score in scores.values()]) == pytest.approx(0.0, abs=0.8)
    # Each text after the label and after none, which features share, and the probe.
    num = sum(score.num_positive + score.num_negative for score in scores.values())
    assert 1 + num < len(server.requests) == len({str(r["prompt"]) for r in server.requests}) <= 1 + 2 * num


def test_unrelated_and_empty_labels_score_chance_and_labels_share_the_texts_read_without_any(
    world, bench: MakeBench
) -> None:
    lab = bench(num_judged=8, scorers=["surprisal"], num_controlled=2, concurrency=1)
    scores, server = surprised(world, lab, Simulating(0.0), dict.fromkeys(NAMES, describe(UNRELATED)))
    assert all(score.auprc == pytest.approx(0.5, abs=0.25) for score in scores.values())
    empty = [score for score in lab.control_scores.records if score.labeler == "control:empty"]
    assert [(score.auprc, score.gain) for score in empty] == [(pytest.approx(0.5), pytest.approx(0.0))] * 2
    assert {score.labeler for score in lab.control_scores.records} >= {"control:random", "control:shuffled"}
    assert len({str(request["prompt"]) for request in server.requests}) == len(server.requests)


@pytest.mark.parametrize("reads", [None, 404])
def test_server_that_reads_nothing_is_named_once_and_no_feature_fails(
    world, bench: MakeBench, reads: int | None
) -> None:
    told: list[str] = []

    class Listening(Progress):
        def say(self, message: str) -> None:
            told.append(message)

    lab = bench(scorers=["surprisal"])
    with serving(Simulating(reads=reads)) as server:
        config = lab.config.model_copy(update={"base_url": server.url})
        ledger = Ledger(":memory:")
        model = LabellingModel(OpenAIChat(config), ledger, config)
        left = answerable(model, lab.questions([0, 2]), Listening())
    assert left.scorers == []
    assert len(told) == 1
    assert "no logprobs of a text that is read, so surprisal is left out" in told[0]
    # Charged answers without logprobs are on the books; nothing is remembered of this server for the next one.
    assert ledger.wasted.requests == (2 if reads is None else 0)
    assert ledger.find(probe_request("stub").key()) is None


def _read(*tokens: tuple[str, float | None]) -> ChatReply:
    found = tuple(TokenLogprob(text=text, logprob=logprob) for text, logprob in tokens)
    return ChatReply(text="", finish_reason="read", input_tokens=1, output_tokens=0, logprobs=found)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([("<s>", None), ("a", -9.0), (MARK, -9.0), ("b", -1.0), ("\ufffd", -2.0)], -3.0),
        ([("a\n\nText", -9.0), (":\n", -9.0), ("b c", -1.5)], -1.5),
        ([("a", -9.0), (MARK + "b", -1.0), ("c", -2.0)], -3.0),
        ([("a", None), (MARK, -1.0), ("b", None)], None),
        ([("a", None), (MARK, -1.0)], None),
        ([("other", -1.0), ("tokens", -1.0)], None),
    ],
    ids=["plain", "mark in parts", "over the border", "no number", "nothing behind", "other tokens"],
)
def test_text_behind_the_mark_is_summed(tokens: list[tuple[str, float | None]], expected: float | None) -> None:
    reply = _read(*tokens)
    assert text_logprob(reply) == expected
    assert load_logprobs(dump_logprobs(reply.logprobs)) == reply.logprobs


def test_local_model_reads_what_it_gives(tiny_model_dir) -> None:
    lm = load_model(str(tiny_model_dir("llama")))
    config = LLMConfig.parse({"model": "tiny", "backend": "local"})
    ledger = Ledger(":memory:")
    # No chat template is needed for reading.
    model = LabellingModel(LocalChat(config, lm=lm, chats=False), ledger, config)
    asked = dataclasses.replace(probe_request("tiny"), user=f"about rivers{MARK}the river", choices=("0", "1"))
    (answer,) = model.ask([asked])
    ids = torch.tensor([lm.tokenizer(asked.user)["input_ids"]])
    expected = torch.log_softmax(logits(lm, ids)[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    found = answer.reply.logprobs  # type: ignore[union-attr]
    assert found[0].logprob is None
    np.testing.assert_allclose([token.logprob for token in found[1:]], expected.numpy(), atol=2e-5)
    assert text_logprob(answer.reply) < 0  # type: ignore[arg-type, operator]
    (again,) = LabellingModel(LocalChat(config, lm=lm, chats=False), ledger, config).ask([asked])
    assert again.reply == answer.reply
    (cut,) = model.ask([dataclasses.replace(asked, user="the river " * 60)])
    assert "longer than its context" in cut.reason
