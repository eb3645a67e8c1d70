"""A text gone through in segments of token rows, again and again, without the documents that are held out."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator

import numpy as np

from saekit.activations.ring import Place
from saekit.activations.rows import TokenTable, kinds_of
from saekit.errors import DataError
from saekit.models.texts import Document, FileTextConfig, HubTextConfig, iter_documents
from saekit.models.tokens import TokenConfig, Tokenizer, iter_token_rows

__all__ = ["TextWalk"]


class TextWalk:
    """Draws one segment's rows after another.

    A segment begins with a document, so that it can be drawn anew without the text before it: what its last row does not hold
    of the last document is left out. At the end of the text, what fills no row is left out, and the next segment begins with
    the first document again.
    """

    def __init__(
        self,
        text: HubTextConfig | FileTextConfig,
        tokenizer: Tokenizer,
        config: TokenConfig,
        *,
        held_out: frozenset[int] = frozenset(),
    ) -> None:
        """Reads nothing yet.

        Args:
            text: the documents.
            tokenizer: of the model.
            config: how documents become rows.
            held_out: keys of documents that are left out, see `TokenTable.document_keys`.
        """
        self._text = text
        self._tokenizer = tokenizer
        self._config = config
        self._held_out = held_out
        self._place: Place | None = None
        self._documents: Iterator[Document] = iter(())
        self._is_at_end = False
        # Given to the tokeniser, which reads ahead, and perhaps not in a row yet.
        self._ahead: deque[Document] = deque()

    def draw(self, place: Place, num_rows: int) -> tuple[TokenTable, Place, Place]:
        """Returns at most `num_rows` rows from a place on, where they begin (at the first document, where the text has ended),
        and the place of the next ones.

        Raises:
            DataError: as documents and tokeniser say.
        """
        if place != self._place:
            self._open(place)
        context_len = self._config.context_len
        tokens = np.empty((num_rows, context_len), np.int32)
        owners, kinds = np.empty_like(tokens), np.empty(tokens.shape, np.uint8)
        filled = 0
        config = self._config.model_copy(update={"max_documents": None})
        try:
            rows = iter_token_rows(self._stream(), self._tokenizer, config)
            for filled, row in enumerate(itertools.islice(rows, num_rows), start=1):
                tokens[filled - 1], owners[filled - 1], kinds[filled - 1] = row.tokens, row.document, kinds_of(row)
                self._forget(before=int(row.document.max()))
        except DataError:
            if not (self._is_at_end and place.document and not filled):
                raise
            return self.draw(Place(place.passes + 1, 0), num_rows)
        end = Place(place.passes, int(owners[filled - 1].max()) + 1)
        self._forget(before=end.document)
        self._place = end
        keys = np.empty(0, np.uint64)
        table = TokenTable(tokens=tokens[:filled], documents=owners[:filled], kinds=kinds[:filled], document_keys=keys)
        return table, place, end

    def _open(self, place: Place) -> None:
        documents = itertools.islice(iter_documents(self._text), self._config.max_documents)
        self._documents = itertools.dropwhile(lambda document: document.index < place.document, documents)
        self._ahead.clear()
        self._is_at_end = False
        self._place = place

    def _stream(self) -> Iterator[Document]:
        """Yields what the segment before was given and did not use, then further documents."""
        yield from tuple(self._ahead)
        for document in self._documents:
            if _key(document) not in self._held_out:
                self._ahead.append(document)
                yield document
        self._is_at_end = True

    def _forget(self, *, before: int) -> None:
        while self._ahead and self._ahead[0].index < before:
            self._ahead.popleft()


def _key(document: Document) -> int:
    return int(hashlib.sha256(document.text.encode()).hexdigest()[:16], 16)
