"""Clauses against a plain loop over tokens, scores against sklearn's definitions written out, shapes by hand."""

import numpy as np
import pytest

from saekit.errors import ConfigError
from saekit.labelling.rules import Clause, Rule, TokenIndex
from saekit.labelling.scoring.rule import average_precision
from saekit.labelling.shapes import SHAPES
from saekit.labelling.tokentable import TokenTable
from saekit.labelling.vocabulary import Vocabulary
from tests.saekit.labelling.planted import ID, WORDS, FakeStore, WordTokenizer

RIVER, NEW, YORK, STOP = ID[" river"], ID[" New"], ID[" York"], ID["."]


@pytest.fixture(scope="module")
def table(world) -> TokenTable:
    # Rows with gaps between them, as a sample has.
    return TokenTable(world.store, np.arange(0, world.store.num_rows, 3), Vocabulary(WordTokenizer()))


def _by_hand(table: TokenTable, clause: Clause) -> list[int]:
    ids, documents, found = table.ids, table.documents, []
    for at in range(len(ids)):
        row_start = at - at % table.context_len
        row_end = row_start + table.context_len
        has_before = at > row_start and documents[at - 1] == documents[at]
        has_after = at + 1 < row_end and documents[at + 1] == documents[at]
        if clause.place == "current":
            holds = ids[at] in clause.tokens
        elif clause.place == "previous":
            holds = has_before and ids[at - 1] in clause.tokens
        elif clause.place == "next":
            holds = has_after and ids[at + 1] in clause.tokens
        elif clause.place == "pair":
            holds = has_before and ids[at - 1] in clause.previous and ids[at] in clause.tokens
        elif clause.place == "nearby":
            reach = range(max(row_start, at - 31), at + 1)
            holds = any(ids[i] in clause.tokens and documents[i] == documents[at] for i in reach)
        else:
            holds = True
        if holds:
            found.append(at)
    return found


def _clause(place: str, tokens: tuple[int, ...] = (), **more: object) -> Clause:
    return Clause.parse({"place": place, "tokens": tokens, "precision": 0.5, "recall": 0.5, **more})


@pytest.mark.parametrize(
    "clause",
    [
        _clause("current", (RIVER, STOP)),
        _clause("current", (10_000,)),
        _clause("previous", (NEW,)),
        _clause("next", (STOP,)),
        _clause("pair", (YORK,), previous=(NEW,)),
        _clause("nearby", (ID[" war"], ID[" army"])),
        _clause("always"),
    ],
    ids=lambda clause: f"{clause.place}-{len(clause.tokens)}",
)
def test_clause_holds_where_a_loop_says(table: TokenTable, clause: Clause) -> None:
    assert TokenIndex(table).places(clause).tolist() == _by_hand(table, clause)


def test_rule_gives_the_largest_precision_of_the_clauses_that_hold(table: TokenTable) -> None:
    low = _clause("current", (RIVER, STOP)).model_copy(update={"precision": 0.2})
    high = _clause("current", (STOP,)).model_copy(update={"precision": 0.9})
    places, scores = TokenIndex(table).scores(Rule(clauses=(low, high)))
    expected = dict.fromkeys(_by_hand(table, low), 0.2) | dict.fromkeys(_by_hand(table, high), 0.9)
    assert dict(zip(places.tolist(), scores.tolist(), strict=True)) == expected
    assert (np.diff(places) > 0).all()


def test_rule_without_clauses_never_holds(table: TokenTable) -> None:
    assert [len(part) for part in TokenIndex(table).scores(Rule())] == [0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"place": "shape", "shape": "nonsense"}, "no shape 'nonsense'"),
        ({"place": "current"}, "needs tokens"),
        ({"place": "pair", "tokens": (1,)}, "previous tokens"),
        ({"place": "behind", "tokens": (1,)}, "place"),
    ],
    ids=["shape", "no tokens", "pair", "place"],
)
def test_impossible_clause_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Clause.parse({"precision": 0.5, "recall": 0.5, **values})


def test_rule_survives_json() -> None:
    rule = Rule(clauses=(_clause("pair", (YORK,), previous=(NEW,)), _clause("shape", shape="digit")))
    assert Rule.parse(rule.to_dict()) == rule
    assert rule.tokens == (NEW, YORK)


def test_average_precision_equals_the_sum_over_thresholds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        truth = generator.random(200) < 0.2
        graded = np.round(generator.random(200), 1) * (generator.random(200) < 0.5)
        total = 0.0
        recall_before = 0.0
        for threshold in sorted(set(graded.tolist()), reverse=True):
            said = graded >= threshold
            recall = (said & truth).sum() / truth.sum()
            total += (recall - recall_before) * (said & truth).sum() / said.sum()
            recall_before = recall
        at = np.flatnonzero(graded > 0)
        got = average_precision(graded[at], truth[at], num_positive=int(truth.sum()), num_tokens=200)
        assert got == pytest.approx(total)


def test_average_precision_of_an_empty_rule_is_the_base_rate() -> None:
    got = average_precision(np.empty(0), np.empty(0, dtype=bool), num_positive=7, num_tokens=100)
    assert got == pytest.approx(0.07)


SENTENCES = [
    # text as tokens, and for some shapes the places where they hold
    (
        [" In", " ", "1", "9", "6", "9", ",", " Neil", " Arm", "strong", " walked", ".", " He"],
        {
            "digit": [2, 3, 4, 5],
            "year": [2, 3, 4, 5],
            "number_1": [2],
            "number_4": [5],
            "after_number": [6],
            "capitalised": [0, 7, 8, 12],
            "second_name": [8],
            "name": [7, 8],
            "piece": [9],
            "name_piece": [9],
            "first_piece": [8],
            "sentence_start": [12],
            "punctuation": [6, 11],
            "row_start": [0],
            "row_start_2": [0, 1],
            "document_start": [0],
        },
    ),
    (
        [" (", "one", ")", ' "', "two", '"', "\n", "NATO", " \u00e9t\u00e9", " 1", "2", "3", "4", "5"],
        {
            "bracket": [0, 1],
            "quoted": [3, 4],
            "line_break": [6],
            "line_start": [7],
            "capitals": [7],
            "foreign": [8],
            "year": [],
            "number_2": [10],
            "number_3": [11],
        },
    ),
]


@pytest.mark.parametrize(("words", "expected"), SENTENCES, ids=["sentence", "marks"])
def test_shapes_hold_where_a_reader_says(words: list[str], expected: dict[str, list[int]]) -> None:
    class Tokenizer(WordTokenizer):
        texts = ("a", *dict.fromkeys(words))

        def __len__(self) -> int:
            return len(self.texts)

        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            return {"input_ids": [self.texts.index(text)]}

        def decode(self, token_ids, **options: bool) -> str:
            return "".join(self.texts[token] for token in token_ids)

    vocabulary = Vocabulary(Tokenizer())
    ids = np.array([[Tokenizer.texts.index(word) for word in words]])
    import torch

    store = FakeStore(ids, np.zeros_like(ids), torch.zeros(1, len(words), 1))
    table = TokenTable(store, np.array([0]), vocabulary)
    for name, places in expected.items():
        assert np.flatnonzero(table.shape(name)).tolist() == places, name


def test_shapes_do_not_look_across_documents(world, table: TokenTable) -> None:
    digit = table.shape("digit")
    after = np.flatnonzero(table.shape("after_number"))
    for at in after:
        assert digit[at - 1]
        assert table.documents[at - 1] == table.documents[at]
        assert at % table.context_len


def test_document_start_knows_rows_that_were_not_drawn(world, table: TokenTable) -> None:
    documents = world.store.documents().reshape(-1)
    for at in np.flatnonzero(table.shape("document_start")):
        flat = int(table.rows[at // table.context_len] * table.context_len + at % table.context_len)
        assert flat == 0 or documents[flat - 1] != documents[flat]


def test_every_shape_has_a_title_of_its_own() -> None:
    titles = [shape.title for shape in SHAPES.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" river", '"river"'),
        ("ing", '"ing"'),
        ("\n", "line break"),
        ("\n\n", "paragraph break"),
        (" ", "space"),
        ("   ", "3 spaces"),
        ("", "empty token"),
        ("\n\n\n", "3 line breaks"),
        ("\ufffd", "part of a character"),
        (" a\nb", '"a\\nb"'),
    ],
)
def test_tokens_are_shown_as_a_reader_should_see_them(text: str, shown: str) -> None:
    assert Vocabulary(WordTokenizer()).show_text(text) == shown


def test_words_join_spellings() -> None:
    vocabulary = Vocabulary(WordTokenizer())
    assert {WORDS[token] for token in vocabulary.tokens_of_word(ID[" River"])} == {" river", " River"}
    assert vocabulary.text(9999) == "<9999>"
