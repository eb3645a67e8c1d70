"""Documents -> token rows of one length, with every token's document and every rule about special tokens explicit."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from saekit.config import Config
from saekit.errors import DataError
from saekit.models.texts import Document

if TYPE_CHECKING:
    from saekit.models.load import LanguageModel

__all__ = [
    "TokenConfig",
    "TokenCounts",
    "TokenRow",
    "Tokenizer",
    "adds_bos",
    "check_context_len",
    "iter_token_rows",
    "special_token_ids",
]

# Enough for the tokenizer's threads to share, few enough to hold whole books.
_BATCH_DOCUMENTS = 64


class Tokenizer(Protocol):
    """What saekit uses of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    all_special_ids: list[int]

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""

    def __call__(self, text: str | list[str], **options: bool) -> dict[str, list[object]]:
        """Token ids under the key `input_ids`."""

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        """Text of a sequence of ids."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Vocabulary entries of ids."""

    def get_vocab(self) -> dict[str, int]:
        """Vocabulary entry -> id."""

    def save_pretrained(self, save_directory: str) -> object:
        """Writes the tokenizer's files."""


class TokenConfig(Config):
    """How documents become rows."""

    context_len: int = Field(default=128, ge=2)
    """Tokens a row."""
    packing: Literal["pack", "per_document"] = "pack"
    """`pack`: documents joined, every row full. `per_document`: each document starts a row of its own; a longer one goes on
    in further rows, and its last row is padded."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether each row starts with the tokenizer's BOS token; `auto`: if the tokenizer itself puts it before a text."""
    separator: Literal["eos", "none"] = "eos"
    """What `pack` puts after each document: the tokenizer's EOS token, or nothing."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read no more documents than this; None: all."""
    max_document_tokens: int | None = Field(default=None, ge=1)
    """Keep no more than the first so many tokens of a document, so that few tokens still come from many; None: all."""


class TokenRow(NamedTuple):
    """One sequence for the model."""

    tokens: npt.NDArray[np.int32]
    """`[T]` token ids."""
    document: npt.NDArray[np.int32]
    """`[T]` index of the document that each token belongs to; -1 for padding."""
    special: npt.NDArray[np.bool_]
    """`[T]` true for BOS, EOS, padding and separators."""


@dataclass(slots=True)
class TokenCounts:
    """What became of the documents; counts up while rows are drawn.

    Documents are tokenised in batches, so the counts run up to 64 documents ahead of the rows.
    """

    documents: int = 0
    """Read, empty ones included."""
    empty: int = 0
    """Skipped because they hold no token."""
    split: int = 0
    """Longer than what was left of their row, and so spread over several rows."""
    cut: int = 0
    """Longer than `max_document_tokens`, whose rest was left out."""
    rows: int = 0
    """Made."""
    tokens: int = 0
    """In those rows, padding left out."""
    dropped_tokens: int = 0
    """At the very end of packing, too few to fill one more row."""

    def notes(self) -> list[str]:
        """Returns one line for each thing that a user should know of."""
        notes = []
        if self.empty:
            notes.append(f"empty documents skipped: {self.empty:,} of {self.documents:,}")
        if self.split:
            notes.append(f"documents over more than one row: {self.split:,} of {self.documents:,}")
        if self.cut:
            notes.append(f"documents cut to max_document_tokens: {self.cut:,} of {self.documents:,}")
        if self.dropped_tokens:
            notes.append(f"tokens at the very end left out, too few for a row: {self.dropped_tokens:,}")
        return notes


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Returns whether the tokenizer by itself puts its BOS token before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the ids of BOS, EOS and padding (which are the separators too), where the tokenizer has them."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return frozenset(id_ for id_ in ids if id_ is not None)


def check_context_len(context_len: int, lm: "LanguageModel") -> None:
    """Checks that rows of `context_len` fit into the model.

    Raises:
        DataError: they do not.
    """
    if lm.context_len is not None and context_len > lm.context_len:
        raise DataError(f"context_len {context_len}: {lm.name!r} has a context of {lm.context_len} tokens")


def iter_token_rows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    config: TokenConfig,
    *,
    start_row: int = 0,
    counts: TokenCounts | None = None,
) -> Iterator[TokenRow]:
    """Yields rows of exactly `config.context_len` tokens; the same documents give the same rows.

    Args:
        documents: in order; see `iter_documents`.
        start_row: leave out that many rows, to go on where a former run ended; they are counted.
        counts: counts up while rows are drawn.

    Raises:
        DataError: no document at all, only empty ones, too few tokens for one row, or a special token that the config asks
            for and the tokenizer does not have.
    """
    counts = TokenCounts() if counts is None else counts
    layout = _layout(tokenizer, config)
    tokenized = _tokenized(documents, tokenizer, config, counts)
    rows = _packed(tokenized, layout, counts) if config.packing == "pack" else _per_document(tokenized, layout, counts)
    return itertools.islice(_checked(rows, counts, config), start_row, None)


class _Layout(NamedTuple):
    """Special tokens of a row."""

    context_len: int
    bos: int | None
    separator: int | None
    pad: int
    special: npt.NDArray[np.int32]

    @property
    def body_len(self) -> int:
        return self.context_len - (self.bos is not None)

    def row(self, tokens: npt.NDArray[np.int32], document: npt.NDArray[np.int32]) -> TokenRow:
        """Returns a row of a body of at most `body_len` tokens."""
        if self.bos is not None:
            tokens, document = np.append(np.int32(self.bos), tokens), np.append(document[:1], document)
        missing = self.context_len - len(tokens)
        special = np.isin(tokens, self.special)
        if missing:
            tokens = np.append(tokens, np.full(missing, self.pad, np.int32))
            document = np.append(document, np.full(missing, -1, np.int32))
            special = np.append(special, np.ones(missing, np.bool_))
        return TokenRow(tokens, document, special)


class _Tokenized(NamedTuple):
    document: int
    ids: npt.NDArray[np.int32]


def _layout(tokenizer: Tokenizer, config: TokenConfig) -> _Layout:
    bos = tokenizer.bos_token_id
    use_bos = config.bos == "always" or (config.bos == "auto" and adds_bos(tokenizer))
    if use_bos and bos is None:
        raise DataError("tokens.bos 'always': the tokenizer has no BOS token, needs bos = 'auto' or 'never'")
    eos = tokenizer.eos_token_id
    use_separator = config.packing == "pack" and config.separator == "eos"
    if use_separator and eos is None:
        raise DataError("tokens.separator 'eos': the tokenizer has no EOS token, needs separator = 'none'")
    # Padding is masked, so any id does where the tokenizer has none of its own.
    pad = next((id_ for id_ in (tokenizer.pad_token_id, eos, bos) if id_ is not None), 0)
    return _Layout(
        context_len=config.context_len,
        bos=bos if use_bos else None,
        separator=eos if use_separator else None,
        pad=pad,
        special=np.array(sorted(special_token_ids(tokenizer)), np.int32),
    )


def _tokenized(
    documents: Iterable[Document], tokenizer: Tokenizer, config: TokenConfig, counts: TokenCounts
) -> Iterator[list[_Tokenized]]:
    """Yields batches of the documents that hold tokens."""
    stream = itertools.islice(documents, config.max_documents)
    while batch := list(itertools.islice(stream, _BATCH_DOCUMENTS)):
        counts.documents += len(batch)
        full = [document for document in batch if document.text and not document.text.isspace()]
        if not full:
            counts.empty += len(batch)
            continue
        # BOS and EOS are placed by the layout alone; `verbose` would warn of texts longer than the context.
        encoded = tokenizer(
            [document.text for document in full],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        tokenized = [
            _Tokenized(document.index, np.array(ids, np.int32))
            for document, ids in zip(full, encoded, strict=True)
            if ids
        ]
        if (longest := config.max_document_tokens) is not None:
            counts.cut += sum(len(item.ids) > longest for item in tokenized)
            tokenized = [_Tokenized(item.document, item.ids[:longest]) for item in tokenized]
        counts.empty += len(batch) - len(tokenized)
        yield tokenized


def _packed(batches: Iterable[list[_Tokenized]], layout: _Layout, counts: TokenCounts) -> Iterator[TokenRow]:
    end = np.array([] if layout.separator is None else [layout.separator], np.int32)
    tokens, document = np.empty(0, np.int32), np.empty(0, np.int32)
    for batch in batches:
        pieces = [np.append(item.ids, end) for item in batch]
        owners = [np.full(len(piece), item.document, np.int32) for item, piece in zip(batch, pieces, strict=True)]
        start = len(tokens) + np.cumsum([0, *(len(piece) for piece in pieces)])
        counts.split += int(np.sum(start[:-1] // layout.body_len != (start[1:] - 1) // layout.body_len))
        tokens = np.concatenate([tokens, *pieces])
        document = np.concatenate([document, *owners])
        num_rows = len(tokens) // layout.body_len
        for row in range(num_rows):
            body = slice(row * layout.body_len, (row + 1) * layout.body_len)
            yield layout.row(tokens[body], document[body])
        tokens, document = tokens[num_rows * layout.body_len :], document[num_rows * layout.body_len :]
    counts.dropped_tokens = len(tokens)


def _per_document(batches: Iterable[list[_Tokenized]], layout: _Layout, counts: TokenCounts) -> Iterator[TokenRow]:
    for item in itertools.chain.from_iterable(batches):
        counts.split += len(item.ids) > layout.body_len
        for start in range(0, len(item.ids), layout.body_len):
            body = item.ids[start : start + layout.body_len]
            yield layout.row(body, np.full(len(body), item.document, np.int32))


def _checked(rows: Iterator[TokenRow], counts: TokenCounts, config: TokenConfig) -> Iterator[TokenRow]:
    for row in rows:
        counts.rows += 1
        counts.tokens += int(np.count_nonzero(row.document >= 0))
        yield row
    if counts.rows:
        return
    if not counts.documents:
        raise DataError("text: no documents, needs at least one")
    if counts.empty == counts.documents:
        raise DataError(f"text: nothing but empty documents ({counts.documents:,}), needs at least one with text")
    raise DataError(
        f"text: {counts.dropped_tokens:,} tokens in all, needs at least {config.context_len:,} for one row;"
        " lower context_len, or use packing = 'per_document'"
    )
