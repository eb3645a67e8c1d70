"""Rows of tokens and their documents: all that texts of contexts and token rules need of a store."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["StackedRows", "TokenRows"]


class TokenRows(Protocol):
    """R rows of T tokens; an activation store is one."""

    context_len: int

    def tokens(self) -> NDArray[np.int32]:
        """Returns the tokens [R, T]."""

    def documents(self) -> NDArray[np.int32]:
        """Returns the document of each token [R, T], -1 for padding."""


class StackedRows:
    """The rows of two stores, one below the other, the shorter ones padded; their documents stay apart.

    Attributes:
        context_len: the longer of the two.
        widths: the context length of each.
        num_first_rows: rows of the first.
    """

    def __init__(self, first: TokenRows, second: TokenRows) -> None:
        self.widths = first.context_len, second.context_len
        self.context_len = max(self.widths)
        self.num_first_rows = len(first.tokens())
        shift = int(first.documents().max(initial=-1)) + 1
        others = second.documents()
        self._tokens = self._stacked(first.tokens(), second.tokens(), 0)
        self._documents = self._stacked(first.documents(), np.where(others >= 0, others + shift, -1), -1)

    def _stacked(self, first: NDArray[np.int32], second: NDArray[np.int32], padding: int) -> NDArray[np.int32]:
        made = np.full((len(first) + len(second), self.context_len), padding, dtype=np.int32)
        made[: len(first), : first.shape[1]] = first
        made[len(first) :, : second.shape[1]] = second
        return made

    def tokens(self) -> NDArray[np.int32]:
        """Returns the tokens [R, T], 0 for padding."""
        return self._tokens

    def documents(self) -> NDArray[np.int32]:
        """Returns the document of each token [R, T], -1 for padding."""
        return self._documents
