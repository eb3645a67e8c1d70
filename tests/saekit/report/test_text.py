import numpy as np
import pytest

from saekit.report.text import TIE, PieceTable, visible


class FakeTokenizer:
    """A vocabulary given as a list."""

    def __init__(self, entries: list[str], special: tuple[int, ...] = ()) -> None:
        self.entries = entries
        self.all_special_ids = list(special)

    def __len__(self) -> int:
        return len(self.entries)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.entries[token] for token in ids]

    def decode(self, token_ids: list[int]) -> str:
        return "|".join(self.entries[token] for token in token_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ("a\nb\r\tc", "a\u21b5b\u240d\u21e5c"),
        ("\x00\x1b\x7f", "\u2400\u241b\u2421"),
        ("x\u202ey\u200bz\ufeff", "x\u27e8U+202E\u27e9y\u27e8U+200B\u27e9z\u27e8U+FEFF\u27e9"),
        ("\u2028\u2029\x85", "\u27e8U+2028\u27e9\u27e8U+2029\u27e9\u27e8U+0085\u27e9"),
        ("\ud800", "\u27e8U+D800\u27e9"),
        ("\U000f0000\u0378", "\u27e8U+F0000\u27e9\u27e8U+0378\u27e9"),
        ("na\u00efve \u4f60 \U0001f468\u200d\U0001f469", "na\u00efve \u4f60 \U0001f468\u200d\U0001f469"),
        ("1\u00a0km", "1\u237dkm"),
    ],
    ids=["ascii", "newlines", "control", "bidi", "separators", "surrogate", "unassigned", "kept", "no-break-space"],
)
def test_visible_shows_what_cannot_be_seen(text: str, expected: str) -> None:
    assert visible(text) == expected


def _pieces(tokenizer: FakeTokenizer, row: list[int]) -> list[str]:
    table = PieceTable(tokenizer)
    table.add_rows(np.array([row], np.int32))
    found = table.compact()
    return [found.strings[piece] for piece in found.rows[0][0]]


# Byte-level alphabet: U+0120 is a blank, U+010A a newline, \u00e4\u00bd\u0142 the bytes e4 bd a0 of U+4F60.
BYTE_LEVEL = [
    "\u0120the",
    "\u00e4",
    "\u00bd",
    "\u0142",
    "\u0120\u00e4\u00bd",
    "a\u010a",
    "<s>",
    "\u00e9",
    "\u0120",
    "raw text",
    "!",
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0, 10], [" the", "!"]),
        ([1, 2, 3], ["\u4f60", TIE, TIE]),
        ([0, 4, 3, 0], [" the", " \u4f60", TIE, " the"]),
        ([1, 2, 3, 1, 2, 3], ["\u4f60", TIE, TIE, "\u4f60", TIE, TIE]),
        ([3, 0], ["\\xa0", " the"]),
        ([1, 2, 0], ["\\xe4", "\\xbd", " the"]),
        ([1, 1, 2, 3], ["\\xe4", "\u4f60", TIE, TIE]),
        ([7], ["\\xe9"]),
        ([5, 6, 9, 8], ["a\u21b5", "<s>", "raw text", " "]),
        ([99], ["\u27e899\u27e9"]),
    ],
    ids=[
        "whole",
        "split",
        "blank-first",
        "twice",
        "starts-inside",
        "ends-inside",
        "broken-lead",
        "lone-byte",
        "others",
        "unknown-id",
    ],
)
def test_pieces_of_byte_level_tokens_join_characters(row: list[int], expected: list[str]) -> None:
    assert _pieces(FakeTokenizer(BYTE_LEVEL, special=(6,)), row) == expected


def test_pieces_of_sentencepiece_tokens_read_byte_fallback() -> None:
    tokenizer = FakeTokenizer(["\u2581the", "<0xE4>", "<0xBD>", "<0xA0>", "<0x0A>", "s", "\u2581\u2581"])
    assert _pieces(tokenizer, [0, 5, 1, 2, 3, 4, 6]) == [" the", "s", "\u4f60", TIE, TIE, "\u21b5", "  "]


def test_pieces_of_other_tokenizers_are_what_they_decode() -> None:
    assert _pieces(FakeTokenizer(["ab", "c\n"]), [0, 1]) == ["ab", "c\u21b5"]


def test_the_same_token_has_one_piece_alone_and_others_in_rows() -> None:
    table = PieceTable(FakeTokenizer(BYTE_LEVEL))
    table.add_rows(np.array([[1, 2, 3, 0]], np.int32))
    table.add_tokens(np.array([[1, 3], [0, 10]]))
    found = table.compact()
    assert [found.strings[piece] for piece in found.rows[0][0]] == ["\u4f60", TIE, TIE, " the"]
    alone = found.of_tokens(np.array([[1, 3], [0, 10]]))
    assert [[found.strings[piece] for piece in row] for row in alone] == [["\\xe4", "\\xa0"], [" the", "!"]]
    assert len(set(found.strings)) == len(found.strings)


def test_special_tokens_are_marked() -> None:
    table = PieceTable(FakeTokenizer(BYTE_LEVEL, special=(6,)))
    table.add_rows(np.array([[0, 6]], np.int32))
    found = table.compact()
    assert [found.strings[piece] for piece in found.special] == ["<s>"]


@pytest.mark.parametrize(
    "text",
    [
        "The moon rose.",
        "na\u00efve caf\u00e9 \u4f60\u597d\u4e16\u754c",
        "\U0001f40d\U0001f469\u200d\U0001f680 ok",
        "\u05e9\u05dc\u05d5\u05dd \u0639\u0631\u0628\u064a",
        "tabs\tand\nlines",
    ],
    ids=["ascii", "cjk", "emoji", "bidi", "blanks"],
)
def test_pieces_of_a_real_tokenizer_spell_the_text(text: str, tokenizer: object) -> None:
    tokens = tokenizer(text)["input_ids"]  # type: ignore[operator]
    table = PieceTable(tokenizer)  # type: ignore[arg-type]
    table.add_rows(np.array([tokens], np.int32))
    found = table.compact()
    assert "".join(found.strings[piece] for piece in found.rows[0][0] if found.strings[piece] != TIE) == visible(text)


def test_no_rows_and_no_tokens_make_an_empty_table() -> None:
    table = PieceTable(FakeTokenizer(BYTE_LEVEL))
    table.add_rows(np.zeros((0, 8), np.int32))
    found = table.compact()
    assert (found.strings, found.special, found.rows[0].shape) == ([], [], (0, 8))
