"""Held-out text in pieces that are cut at fixed places, and draws of them that give nothing away by their lengths.

Shapes: L places of the held-out table, n pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.scoring.rule import HeldOut

__all__ = ["PIECE_TOKENS", "Piece", "PieceTable"]

PIECE_TOKENS = 32
MIN_PIECE_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One piece of held-out text."""

    start: int
    """First place in the held-out table."""
    stop: int
    document: int
    """Document of the store."""
    is_active: bool
    """What a judge has to find out: whether the feature fires on any of its tokens or, with marks, on the marked ones."""
    marked: tuple[int, ...] = ()
    """Places that are marked, counted from `start`, ascending."""
    is_near: bool = False
    """A negative in which the feature's siblings fire; counted apart."""

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return self.stop - self.start


class PieceTable:
    """Pieces of up to 32 tokens, none across the border of a row or document, all of whose tokens were encoded."""

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out = held_out
        table = held_out.table
        place = np.arange(len(table))
        begins = (place - table.segment_start) % PIECE_TOKENS == 0
        self._starts = np.flatnonzero(begins)
        self.lengths: NDArray[np.int64] = (
            np.minimum(self._starts + PIECE_TOKENS, table.segment_end[self._starts] + 1) - self._starts
        )
        self._piece_of = np.cumsum(begins) - 1
        scored = np.add.reduceat(held_out.in_view.astype(np.int64), self._starts) if len(place) else self._starts
        # A token that was not encoded could hide a firing, so only pieces that were seen whole are used.
        self._is_whole = (scored == self.lengths) & (scored >= MIN_PIECE_TOKENS)

    def sides(self, feature: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the numbers of the pieces in which a feature fires, and of those in which it does not."""
        is_active = np.zeros(len(self._starts), dtype=bool)
        is_active[self._piece_of[self.held_out.firings(feature)]] = True
        return np.flatnonzero(self._is_whole & is_active), np.flatnonzero(self._is_whole & ~is_active)

    def natural_rate(self, feature: int) -> float | None:
        """Returns the share of all pieces in which a feature fires; None where there are no pieces."""
        active, silent = self.sides(feature)
        total = len(active) + len(silent)
        return len(active) / total if total else None

    def shuffled(self, pieces: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """Returns pieces in random order, one of each document before any second one."""
        order = generator.permutation(pieces)
        documents = self.held_out.table.documents[self._starts[order]]
        _, first = np.unique(documents, return_index=True)
        is_first = np.zeros(len(order), dtype=bool)
        is_first[first] = True
        return np.concatenate([order[is_first], order[~is_first]])

    def piece(self, number: int, *, is_active: bool) -> Piece:
        """Returns one piece by its number."""
        start = int(self._starts[number])
        return Piece(
            start=start,
            stop=start + int(self.lengths[number]),
            document=int(self.held_out.table.documents[start]),
            is_active=is_active,
        )

    def number(self, piece: Piece) -> int:
        """Returns the number of a piece, or of the one that it was cut from."""
        return int(self._piece_of[piece.start])

    def strongest(self, feature: int) -> list[tuple[int, int]]:
        """Returns (number, place of the peak) of the pieces in which a feature fires, the strongest first."""
        places, acts = self.held_out.firings(feature), self.held_out.activations(feature)
        best: dict[int, int] = {}
        for at in np.argsort(-acts, kind="stable").tolist():
            best.setdefault(int(self._piece_of[places[at]]), int(places[at]))
        return list(best.items())

    def pairs(
        self, feature: int, num: int, generator: np.random.Generator, *, others: int = 0
    ) -> tuple[list[tuple[Piece, Piece]], list[int]]:
        """Returns up to `num` pairs of an active and a silent piece, and up to `others` further active pieces' numbers.

        The silent piece of a pair is cut to the length of the active one: longer pieces are active more often, so a judge who
        only counts words would otherwise beat chance.
        """
        active, silent = (self.shuffled(side, generator) for side in self.sides(feature))
        longest = int(self.lengths[silent].max(initial=0))
        pairs: list[tuple[Piece, Piece]] = []
        passed_over: list[int] = []
        free = np.ones(len(silent), dtype=bool)
        for number in active.tolist():
            length = int(self.lengths[number])
            fits = len(pairs) < min(num, len(silent)) and length <= longest
            fitting = np.flatnonzero(free & (self.lengths[silent] >= length) & fits)
            if len(fitting):
                free[fitting[0]] = False
                negative = self.piece(int(silent[fitting[0]]), is_active=False)
                pairs.append((self.piece(number, is_active=True), cut(negative, length)))
            elif len(passed_over) < others:
                passed_over.append(number)
            elif len(pairs) >= min(num, len(silent)):
                break
        return pairs, passed_over

    def mixed(self, feature: int, num: int, *, seed: int) -> list[Piece]:
        """Returns up to `num` active pieces and as many silent ones, paired as in `pairs`, in random order."""
        generator = np.random.default_rng((seed, feature))
        pairs, _ = self.pairs(feature, num, generator)
        chosen = [piece for pair in pairs for piece in pair]
        return [chosen[place] for place in generator.permutation(len(chosen))]

    def text(self, piece: Piece) -> str:
        """Returns a piece as one line, neighbouring marked tokens in one pair of marks."""
        table, marked = self.held_out.table, set(piece.marked)
        parts: list[str] = []
        for offset, token in enumerate(table.ids[piece.start : piece.stop].tolist()):
            text = table.vocabulary.text(token)
            if offset in marked and offset - 1 not in marked:
                bare = text.lstrip(" ")
                text = text[: len(text) - len(bare)] + "\u00ab" + bare
            parts.append(text + ("\u00bb" if offset in marked and offset + 1 not in marked else ""))
        return " ".join("".join(parts).split())

    def store_indices(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        """Returns the store index (row * T + position) of the first token of each piece."""
        table = self.held_out.table
        return tuple(
            int(table.rows[piece.start // table.context_len]) * table.context_len + piece.start % table.context_len
            for piece in pieces
        )


def cut(piece: Piece, num_tokens: int) -> Piece:
    """Returns the first tokens of a piece."""
    return replace(piece, stop=piece.start + num_tokens)
