"""The published evidence and questions: amounts, forms and what the preset sets."""

import json

import numpy as np
import pytest

from saekit.labelling import Answer, ChatReply, LabelConfig, LLMConfig, TokenEffects
from saekit.labelling.answers import prompt_template
from saekit.labelling.examples import ExampleReader
from saekit.labelling.paper import PAPER_PROMPTS, PaperExplainer
from saekit.labelling.vocabulary import Vocabulary
from tests.saekit.labelling.planted import ID, WordTokenizer

CONFIG = LLMConfig(model="m", style="paper_output_centric")


def _effects(kind: str, promoted: list[str], suppressed: list[str]) -> TokenEffects:
    ids = [np.array([[ID[word] for word in words]]) for words in (promoted, suppressed)]
    values = np.ones(ids[0].shape, dtype=np.float32)
    return TokenEffects(
        kind,  # type: ignore[arg-type]
        np.array([0]),
        promoted_ids=ids[0],
        promoted_values=values,
        suppressed_ids=ids[1],
        suppressed_values=-values,
    )


EFFECTS = [
    _effects("tokenchange", [" war", " army"], [" peace", " song"]),
    _effects("tokenchange_down", [" song", " music"], [" army", " battle"]),
    _effects("vocabproj", [" river", " lake"], [" town", " road"]),
]


@pytest.fixture
def explainer(world, bench):
    contexts = bench().contexts
    reader = ExampleReader(world.store, Vocabulary(WordTokenizer()))
    return lambda kind: PaperExplainer(
        reader, contexts, CONFIG, kind=kind, effects=lambda feature: EFFECTS if feature == 0 else []
    )


def test_token_lists_are_one_list_of_both_sides_without_repeats(explainer) -> None:
    assert explainer("vocabproj").request(0).user == 'Tokens: [" river", " lake", " town", " road"]'
    changed = 'Tokens: [" war", " army", " peace", " song", " music", " battle"]'
    assert explainer("tokenchange").request(0).user == changed


def test_texts_show_every_top_context_from_zero_to_ten_of_its_own_peak(explainer, world, bench) -> None:
    contexts, maxact = bench().contexts, explainer("input")
    for feature in (world.feature("quasar"), world.feature("dense")):
        text = maxact.request(feature).user
        assert text.count("\t10") >= len(contexts.feature(feature))
        blocks = [block for block in text.split("Text ") if block]
        assert len({block.split("\n")[0].split(",")[0] for block in blocks}) == len(contexts.feature(feature))
        for block in blocks:
            levels = [int(line.rpartition("\t")[2]) for line in block.strip("\n").split("\n")[1:]]
            assert max(levels) == 10
            assert "active tokens only" not in block.split("\n")[0] or min(levels) > 0
    assert "active tokens only" in maxact.request(world.feature("quasar")).user
    assert "active tokens only" not in maxact.request(world.feature("dense")).user


def test_raw_joins_texts_and_both_lists(explainer) -> None:
    text = explainer("raw").request(0).user
    assert text.startswith("Text 1\n")
    assert 'Tokens by its weights: [" river"' in text
    assert 'Tokens by turning it: [" war"' in text
    assert "Tokens" not in explainer("input").request(0).user


def test_the_answer_is_the_description_and_the_label_its_beginning(explainer) -> None:
    said = "Names of rivers and lakes, " * 10 + "and no more."
    reply = ChatReply(text=json.dumps({"description": said}), input_tokens=3, output_tokens=4, finish_reason="stop")
    asked = explainer("raw").request(0)
    label = explainer("raw").label(0, [Answer(request=asked, reply=reply)], is_last=True)
    assert label.description == said
    assert label.label == said[:120]
    assert label.prompt_version == "paper_raw_v1"
    empty = ChatReply(text=json.dumps({"description": " "}), input_tokens=3, output_tokens=4, finish_reason="stop")
    failed = explainer("raw").label(0, [Answer(request=asked, reply=empty)], is_last=True)
    assert failed.reason == "empty description"


@pytest.mark.parametrize("name", PAPER_PROMPTS.values())
def test_prompts_have_three_worked_examples(name: str) -> None:
    text = prompt_template(name)
    assert text.count("\nExample ") == 3
    assert text.count('{"description": "') == 4


def test_the_preset_sets_the_published_amounts_and_gives_way_to_what_is_written() -> None:
    config = LabelConfig.parse({"preset": "paper_output_centric", "llm": {"model": "gpt-4o-mini"}})
    change = config.token_change
    assert (config.num_effect_tokens, config.llm.style, config.llm.max_features) == (50, "paper_output_centric", None)
    assert (change.match, change.clamp, change.num_contexts, change.context_len) == ("clamp", 10.0, 32, 32)
    assert change.num_tokens == 10
    assert config.llm.explainers == ("input", "vocabproj", "tokenchange", "raw", "concat")
    assert config.labelers == ("lexical", "llm")
    own = {"token_change": {"clamp": 5.0}, "llm": {"model": "m", "explainers": ["raw"]}, "num_effect_tokens": 7}
    config = LabelConfig.parse({"preset": "paper_output_centric", **own})
    assert (config.token_change.clamp, config.token_change.match, config.num_effect_tokens) == (5.0, "clamp", 7)
    assert config.llm.explainers == ("raw",)
    again = LabelConfig.parse(config.to_dict())
    assert again == config
    assert LabelConfig.parse({"preset": "paper_output_centric"}).llm is None
