"""The offline labeler on planted features: the right words, rules that hold on documents it has not seen, honest failures."""

import numpy as np
import pytest
import torch

from saekit.errors import DataError
from saekit.labelling import ContextConfig, Label, RuleScoringConfig, Score, TokenEffects, collect_contexts, score_rules
from saekit.labelling.examples import feature_examples
from saekit.labelling.lexical import LexicalLabeler
from saekit.labelling.scoring.rule import HeldOut, RuleScores
from saekit.labelling.vocabulary import Vocabulary
from tests.saekit.labelling.planted import ID, FakeStore, FakeView, WordTokenizer, identity_sae


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(WordTokenizer())


@pytest.fixture(scope="module")
def labeler(world, vocabulary, tmp_path_factory) -> LexicalLabeler:
    contexts = collect_contexts(world.sae, world.train, config=ContextConfig(), out=tmp_path_factory.mktemp("c"))
    return LexicalLabeler(world.store, contexts, vocabulary)


@pytest.fixture(scope="module")
def labels(world, labeler) -> dict[str, Label]:
    return {name: labeler.label(world.feature(name)) for name in world.names}


@pytest.fixture(scope="module")
def held_out(world, vocabulary) -> HeldOut:
    return HeldOut(world.sae, world.test, vocabulary, config=RuleScoringConfig())


@pytest.fixture(scope="module")
def scored(held_out, labels) -> RuleScores:
    return score_rules(held_out, list(labels.values()), config=RuleScoringConfig())


@pytest.fixture(scope="module")
def scores(world, scored) -> dict[str, Score]:
    return dict(zip(world.names, scored.scores, strict=True))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("river", '"river", "lake"'),
        ("after_new", 'after "New"'),
        ("digit", "digits"),
        ("new_york", '"York" after "New"'),
        ("before_stop", 'before "."'),
        ("near_war", 'near "war", "army"'),
        ("dense", "all tokens"),
        ("quasar", '"quasar"'),
        ("ania", '"-ania" (Albania, Romania)'),
        ("dead", "never fires"),
        ("noise", "no single-token pattern"),
    ],
)
def test_planted_feature_gets_its_label(labels, name: str, label: str) -> None:
    got = labels[name].label
    # Which of two equally frequent words comes first is chance.
    assert sorted(got.replace("near ", "").split(", ")) == sorted(label.replace("near ", "").split(", "))
    assert labels[name].status == "done"


@pytest.mark.parametrize(
    "name", ["river", "after_new", "digit", "new_york", "before_stop", "near_war", "quasar", "ania"]
)
def test_rule_of_a_planted_feature_is_perfect_on_held_out_documents(scores, name: str) -> None:
    score = scores[name]
    assert (score.f1, score.precision, score.recall, score.auprc) == (1.0, 1.0, 1.0, 1.0)
    assert (score.low, score.high) == (1.0, 1.0)


def test_feature_without_a_pattern_scores_about_its_base_rate(labels, scores) -> None:
    score = scores["noise"]
    assert labels["noise"].confidence < 0.15
    assert score.auprc == pytest.approx(score.base_rate, abs=0.02)
    assert score.f1 < 0.1


def test_dense_feature_scores_what_always_scores(scores) -> None:
    score = scores["dense"]
    assert score.auprc == pytest.approx(score.base_rate, abs=1e-6)
    assert score.f1 == pytest.approx(2 * score.base_rate / (1 + score.base_rate), abs=1e-5)


def test_silent_feature_has_no_score_but_a_record(scores) -> None:
    score = scores["dead"]
    assert (score.f1, score.auprc, score.low, score.num_positive) == (None, None, None, 0)
    assert score.base_rate == 0.0


def test_controls_are_at_chance(scored) -> None:
    controls = scored.controls
    assert controls["labels"] == 11
    assert controls["labels_of_firing_features"] == 10
    assert controls["shuffled_auprc"] == pytest.approx(controls["empty_auprc"], abs=0.05)
    assert controls["shuffled_f1"] < 0.2
    assert controls["empty_f1"] == 0
    assert controls["f1"] > 0.85


def test_rule_tokens_are_the_words_in_all_their_spellings(labels) -> None:
    assert set(labels["river"].rule_tokens) == {ID[" river"], ID[" River"], ID[" lake"]}


def test_description_joins_input_and_output_side(world, labeler) -> None:
    feature = world.feature("river")
    ids = np.array([[ID[" mill"], ID[" town"]]])
    effects = TokenEffects(
        "vocabproj",
        np.array([feature]),
        promoted_ids=ids,
        promoted_values=np.array([[2.0, 1.0]], dtype=np.float32),
        suppressed_ids=ids[:, ::-1],
        suppressed_values=np.array([[-2.0, -1.0]], dtype=np.float32),
    )
    label = labeler.label(feature, effects)
    assert label.promotes == '"mill", "town"'
    assert label.suppresses == '"town", "mill"'
    assert "river" in label.fires_on
    for part in (label.fires_on, 'Makes more likely: "mill", "town".', "\u00ab"):
        assert part in label.description


def test_examples_come_from_training_documents_only(world, labeler, labels) -> None:
    reader = labeler._reader
    documents = set(world.train.documents.tolist())
    for feature in range(len(world.names)):
        for example in feature_examples(reader, labeler._contexts, feature):
            assert example.document in documents
            store_documents = world.store.documents().reshape(-1)
            start = example.flat - example.peak
            assert set(store_documents[start : start + len(example.tokens)].tolist()) == {example.document}


def test_rare_feature_is_labelled_from_its_contexts(world, vocabulary, tmp_path) -> None:
    # Of its 26 firings, fewer than 20 are on the sampled rows: its contexts and the counts of the whole pass must speak.
    config = ContextConfig(num_code_tokens=4000)
    contexts = collect_contexts(world.sae, world.train, config=config, out=tmp_path)
    labeler = LexicalLabeler(world.store, contexts, vocabulary)
    assert labeler.label(world.feature("quasar")).label == '"quasar"'
    assert labeler.label(world.feature("ania")).label.startswith('"-ania"')


def test_empty_tokenizer_is_refused() -> None:
    class Empty(WordTokenizer):
        def __len__(self) -> int:
            return 0

    with pytest.raises(DataError, match="no tokens"):
        Vocabulary(Empty())


def test_dictionary_of_which_no_token_tells_anything_is_labelled(vocabulary, tmp_path) -> None:
    # No rule on tokens is left for any feature.
    tokens = np.random.default_rng(0).integers(0, 30, (8, 64))
    store = FakeStore(tokens, np.repeat(np.arange(8), 64).reshape(8, 64), torch.ones(8, 64, 1))
    view = FakeView(store, np.ones(tokens.shape, dtype=bool))
    contexts = collect_contexts(identity_sae(1), view, config=ContextConfig(), out=tmp_path)
    assert LexicalLabeler(store, contexts, vocabulary).label(0).label == "all tokens"
