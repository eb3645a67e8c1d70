"""A tokenizer's tokens as text: what each piece looks like inside a sentence, which pieces are one word, how to show them."""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saekit.errors import DataError
from saekit.models import Tokenizer

__all__ = ["Vocabulary"]

_NAMES = {
    "\n": "line break",
    "\n\n": "paragraph break",
    "\t": "tab",
    "\r": "carriage return",
    "\u00a0": "no-break space",
}


class Vocabulary:
    """All tokens of a tokenizer, decoded once.

    Attributes:
        texts: token id -> its text inside a sentence, leading space kept; U+FFFD where a token is part of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decodes the vocabulary.

        Raises:
            DataError: the tokenizer has no tokens.
        """
        if len(tokenizer) == 0:
            raise DataError("tokenizer: it has no tokens, needs the tokenizer of the cached model")
        # Decoded alone, a SentencePiece token loses its leading space; behind another token every family keeps it.
        anchor = [int(str(token)) for token in tokenizer("a", add_special_tokens=False)["input_ids"][:1]] or [0]
        before = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
        self.texts: list[str] = [
            tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False)[before:]
            for token in range(len(tokenizer))
        ]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def word_of(self) -> NDArray[np.int32]:
        """Token id -> the smallest id with the same text but for case and surrounding space [V]."""
        first: dict[str, int] = {}
        return np.array(
            [first.setdefault(_normal(text), token) for token, text in enumerate(self.texts)], dtype=np.int32
        )

    @cached_property
    def _members(self) -> dict[int, tuple[int, ...]]:
        members: dict[int, list[int]] = {}
        for token, word in enumerate(self.word_of.tolist()):
            members.setdefault(word, []).append(token)
        return {word: tuple(tokens) for word, tokens in members.items()}

    def tokens_of_word(self, word: int) -> tuple[int, ...]:
        """Returns the ids that differ from `word` in case and surrounding space only, ascending."""
        return self._members[int(self.word_of[word])]

    def text(self, token: int) -> str:
        """Returns a token's text; ids beyond the tokenizer (padded embeddings) read as `<id>`."""
        return self.texts[token] if 0 <= token < len(self.texts) else f"<{token}>"

    def join(self, tokens: Iterable[int]) -> str:
        """Returns the text of consecutive tokens."""
        return "".join(self.text(token) for token in tokens)

    def is_word_start(self, token: int) -> bool:
        """Returns whether a token opens a word: it begins with a space, or with no letter or digit at all."""
        text = self.text(token)
        return not text[:1].isalnum() and text[:1] != "\ufffd"

    def show(self, token: int) -> str:
        """Returns a token as a reader should see it: quoted, without its leading space; blanks and breaks by name."""
        return self.show_text(self.text(token))

    def show_text(self, text: str) -> str:
        """Returns any piece of text as `show` does for a token."""
        if text in _NAMES:
            return _NAMES[text]
        bare = text.strip(" ")
        if not bare:
            return "space" if len(text) == 1 else f"{len(text)} spaces" if text else "empty token"
        if bare.isspace():
            return f"{len(bare)} line breaks" if set(bare) == {"\n"} else "white space"
        if "\ufffd" in bare:
            return "part of a character"
        return '"' + bare.replace("\n", "\\n") + '"'


def _normal(text: str) -> str:
    bare = text.strip()
    return bare.casefold() if any(character.isalnum() for character in bare) else text.lstrip(" ")
