"""Token rows: no token lost, doubled or moved to another document; special tokens exactly where the config says."""

from pathlib import Path

import numpy as np
import pytest

from saekit.errors import ConfigError, DataError
from saekit.models import (
    Document,
    FileTextConfig,
    LanguageModel,
    TokenConfig,
    TokenCounts,
    Tokenizer,
    TokenRow,
    adds_bos,
    check_context_len,
    iter_documents,
    iter_token_rows,
    special_token_ids,
)

BOS, EOS = 0, 1


class _Words:
    """A tokenizer of words: ids from 10 on in the order of first sight; can be told to add BOS by itself."""

    def __init__(self, *, own_bos: bool = False, bos: int | None = BOS, eos: int | None = EOS, pad: int | None = None):
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self._own_bos = bos, eos, pad, own_bos
        # What `adds_bos` tries the tokenizer with.
        self.words = {"a": 9}

    def __call__(self, text: str | list[str], **options: bool) -> dict[str, list[object]]:
        if isinstance(text, str):
            return {"input_ids": self._ids(text, options.get("add_special_tokens", True))}
        return {"input_ids": [self._ids(one, options.get("add_special_tokens", True)) for one in text]}

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = [self.words.setdefault(word, 9 + len(self.words)) for word in text.split()]
        return [BOS, *ids] if special and self._own_bos else ids


def _documents(*lengths: int) -> list[Document]:
    """Documents of so many words, all different; their indices have gaps of three."""
    return [
        Document(3 * i, " ".join(f"d{i}w{j}" for j in range(length)), f"made:{i}") for i, length in enumerate(lengths)
    ]


def _rows(
    lengths: list[int], *, words: _Words | None = None, counts: TokenCounts | None = None, **fields: object
) -> list[TokenRow]:
    config = TokenConfig.parse({"context_len": 8, **fields})
    tokenizer: Tokenizer = words or _Words()  # type: ignore[assignment]  # the part of the protocol that rows use
    return list(iter_token_rows(_documents(*lengths), tokenizer, config, counts=counts))


def _expected_stream(lengths: list[int], *, separator: bool) -> tuple[list[int], list[int]]:
    """Ids and owners of all documents joined, written down without the code under test."""
    ids, owners, next_id = [], [], 10
    for i, length in enumerate(lengths):
        piece = list(range(next_id, next_id + length)) + ([EOS] if separator and length else [])
        next_id += length
        ids += piece
        owners += [3 * i] * len(piece)
    return ids, owners


LENGTHS = [[5, 3, 30, 1, 1, 0, 12], [7] * 9, [200], [1] * 100, [0, 0, 9, 0], list(range(20))]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("bos", ["always", "never"])
@pytest.mark.parametrize("separator", ["eos", "none"])
def test_packed_rows_hold_the_joined_documents(lengths: list[int], bos: str, separator: str) -> None:
    counts = TokenCounts()
    rows = _rows(lengths, counts=counts, bos=bos, separator=separator)
    ids, owners = _expected_stream(lengths, separator=separator == "eos")
    body = 7 if bos == "always" else 8
    assert len(rows) == len(ids) // body
    for number, row in enumerate(rows):
        piece = slice(number * body, (number + 1) * body)
        tokens, document = row.tokens.tolist(), row.document.tolist()
        if bos == "always":
            assert tokens.pop(0) == BOS
            assert document.pop(0) == document[0]
            assert row.special[0]
        assert (tokens, document) == (ids[piece], owners[piece])
        assert row.special.tolist() == [token in (BOS, EOS) for token in row.tokens]
        assert (row.tokens.dtype, row.document.dtype, row.special.dtype) == (np.int32, np.int32, np.bool_)
    assert counts.dropped_tokens == len(ids) - body * len(rows)
    assert counts.documents == len(lengths)
    assert counts.empty == lengths.count(0)
    assert counts.rows == len(rows)
    assert counts.tokens == 8 * len(rows)
    firsts = {owner: owners.index(owner) // body for owner in owners}
    lasts = {owner: (len(owners) - 1 - owners[::-1].index(owner)) // body for owner in owners}
    assert counts.split == sum(firsts[owner] != lasts[owner] for owner in firsts)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("bos", ["always", "never"])
def test_rows_per_document_hold_every_token_of_it(lengths: list[int], bos: str) -> None:
    counts = TokenCounts()
    rows = _rows(lengths, counts=counts, bos=bos, packing="per_document", words=_Words(pad=2))
    body = 7 if bos == "always" else 8
    seen: dict[int, list[int]] = {}
    for row in rows:
        (owner,) = set(row.document[row.document >= 0].tolist())
        real = int((row.document >= 0).sum())
        assert (row.document[:real] == owner).all()
        assert (row.tokens[real:] == 2).all()
        assert row.special[real:].all()
        tokens = row.tokens[:real].tolist()
        if bos == "always":
            assert tokens.pop(0) == BOS
        seen.setdefault(owner, []).extend(tokens)
    ids, owners = _expected_stream(lengths, separator=False)
    assert [token for tokens in seen.values() for token in tokens] == ids
    assert {owner: len(tokens) for owner, tokens in seen.items()} == {o: owners.count(o) for o in dict.fromkeys(owners)}
    assert len(rows) == sum(-(-length // body) for length in lengths)
    assert counts.split == sum(length > body for length in lengths)
    assert counts.dropped_tokens == 0
    assert counts.tokens == len(ids) + (len(rows) if bos == "always" else 0)


@pytest.mark.parametrize(("own_bos", "first"), [(True, BOS), (False, 10)], ids=["adds-bos", "adds-none"])
def test_bos_auto_does_what_the_tokenizer_does(own_bos: bool, first: int) -> None:
    words = _Words(own_bos=own_bos)
    assert adds_bos(words) == own_bos  # type: ignore[arg-type]
    rows = _rows([20], words=words, bos="auto")
    assert rows[0].tokens[0] == first
    assert sum((row.tokens == BOS).sum() for row in rows) == (len(rows) if own_bos else 0)


@pytest.mark.parametrize("pad", [None, 2], ids=["eos-as-pad", "own-pad"])
def test_padding_is_special_and_belongs_to_no_document(pad: int | None) -> None:
    (row,) = _rows([3], words=_Words(pad=pad), packing="per_document", bos="never")
    assert row.tokens.tolist() == [10, 11, 12] + [EOS if pad is None else pad] * 5
    assert row.document.tolist() == [0, 0, 0] + [-1] * 5
    assert row.special.tolist() == [False] * 3 + [True] * 5


def test_special_token_ids_are_those_the_tokenizer_has() -> None:
    assert special_token_ids(_Words(pad=7)) == {0, 1, 7}  # type: ignore[arg-type]
    assert special_token_ids(_Words(bos=None)) == {1}  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["pack", "per_document"])
@pytest.mark.parametrize("start", [0, 1, 7, 23])
def test_rows_from_a_later_start_are_the_same_rows(packing: str, start: int) -> None:
    config = TokenConfig.parse({"context_len": 8, "packing": packing})
    documents = _documents(*range(1, 30))
    everything = list(iter_token_rows(documents, _Words(), config))  # type: ignore[arg-type]
    later = list(iter_token_rows(documents, _Words(), config, start_row=start))  # type: ignore[arg-type]
    assert len(later) == len(everything) - start
    for one, other in zip(later, everything[start:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_number_of_documents_can_be_limited_and_they_are_read_lazily() -> None:
    counts, drawn = TokenCounts(), []

    def endless() -> object:
        for document in _documents(*([9] * 10_000)):
            drawn.append(document.index)
            yield document

    config = TokenConfig(context_len=8, max_documents=100)
    rows = iter_token_rows(endless(), _Words(), config, counts=counts)  # type: ignore[arg-type]
    next(rows)
    assert len(drawn) == 64
    assert len(list(rows)) == 100 * 10 // 8 - 1
    assert counts.documents == len(drawn) == 100


@pytest.mark.parametrize("packing", ["pack", "per_document"])
def test_documents_can_be_cut_to_their_first_tokens(packing: str) -> None:
    counts = TokenCounts()
    rows = _rows([3, 20, 6], packing=packing, context_len=4, bos="never", max_document_tokens=5, counts=counts)
    kept: dict[int, list[int]] = {0: [], 3: [], 6: [], -1: []}
    for row in rows:
        for token, owner, special in zip(row.tokens.tolist(), row.document.tolist(), row.special, strict=True):
            kept[owner] += [] if special else [token]
    assert kept[0] == [10, 11, 12]
    assert kept[3] == [13, 14, 15, 16, 17]
    assert counts.cut == 2
    assert "documents cut to max_document_tokens: 2 of 3" in counts.notes()


def test_counts_tell_what_was_left_out() -> None:
    counts = TokenCounts()
    _rows([0, 20, 0, 3], counts=counts, bos="never")
    assert counts.notes() == [
        "empty documents skipped: 2 of 4",
        "documents over more than one row: 2 of 4",
        "tokens at the very end left out, too few for a row: 1",
    ]
    assert TokenCounts(documents=3, rows=1).notes() == []


@pytest.mark.parametrize(
    ("lengths", "fields", "words", "message"),
    [
        ([], {}, {}, "no documents, needs at least one"),
        ([0, 0, 0], {}, {}, r"nothing but empty documents \(3\), needs at least one with text"),
        ([0], {"packing": "per_document"}, {}, "nothing but empty documents"),
        ([2, 2], {}, {}, "6 tokens in all, needs at least 8 for one row"),
        ([9], {"bos": "always"}, {"bos": None}, "the tokenizer has no BOS token, needs bos = 'auto' or 'never'"),
        ([9], {}, {"eos": None}, "the tokenizer has no EOS token, needs separator = 'none'"),
    ],
    ids=["nothing", "all-empty", "empty-per-document", "too-short", "no-bos", "no-eos"],
)
def test_iter_token_rows_refuses(
    lengths: list[int], fields: dict[str, str], words: dict[str, None], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        _rows(lengths, words=_Words(**words), **fields)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_bos_or_eos_serves_where_none_is_asked_for() -> None:
    words = _Words(bos=None, eos=None)
    (row,) = _rows([5], words=words, packing="per_document")
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, 0, 0, 0]
    assert row.special.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("fields", [{"context_len": 1}, {"packing": "packed"}, {"bos": "yes"}, {"max_documents": 0}])
def test_token_config_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        TokenConfig.parse(fields)


def test_check_context_len_knows_the_models_context(llama: LanguageModel) -> None:
    check_context_len(64, llama)
    with pytest.raises(DataError, match=r"context_len 65: .* has a context of 64 tokens"):
        check_context_len(65, llama)


def test_rows_of_a_real_tokenizer_decode_to_the_texts(
    llama: LanguageModel, documents_file: Path, documents: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    text = FileTextConfig(paths=(str(documents_file),))
    config = TokenConfig(context_len=64, packing="pack", bos="never")
    counts = TokenCounts()
    rows = list(iter_token_rows(iter_documents(text), llama.tokenizer, config, counts=counts))
    stream = np.concatenate([row.tokens for row in rows])
    decoded = llama.tokenizer.decode(stream.tolist())
    joined = "".join(f"{document}<eos>" for document in documents)
    assert joined.startswith(decoded)
    assert counts.dropped_tokens < 64
    assert len(llama.tokenizer(joined[len(decoded) :])["input_ids"]) == counts.dropped_tokens
    # A text longer than the context is the tokenizer's business to split, not to warn of.
    assert capfd.readouterr() == ("", "")
