"""Near negatives among held-out pieces: texts on which a feature's siblings fire most and it is silent throughout.

They are judged beside the random negatives and reported apart: random ones say what a label gives at the natural rate, near ones
whether it tells a feature from its nearest kin.

Source: Paulo et al. 2024 (arXiv 2410.13928): with negatives of similar decoder rows, scores fall to near chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.scoring.pieces import Piece, PieceTable, cut

__all__ = ["NUM_SIBLINGS", "NearPiece", "near_pieces"]

NUM_SIBLINGS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class NearPiece:
    """A silent piece, the sibling that fires in it, and the active piece whose length it has."""

    piece: Piece
    acts: NDArray[np.float32]
    """The sibling's activations on the piece's tokens."""
    like: Piece


def near_pieces(
    table: PieceTable, feature: int, siblings: Sequence[int], *, pairs: Sequence[tuple[Piece, Piece]]
) -> Iterator[NearPiece]:
    """Yields silent pieces in which siblings fire, the strongest of each sibling in turn, nearest siblings first.

    Each is cut to the length of one of the active pieces, these in turn, and holds the sibling's peak still; none of the
    random negatives comes again.

    Args:
        pairs: the active pieces and random negatives that are judged anyway.
    """
    if not pairs:
        return
    _, silent = table.sides(feature)
    free = set(silent.tolist()) - {table.number(piece) for _, piece in pairs}
    found = 0
    for turn in zip_longest(*(table.strongest(sibling) for sibling in siblings)):
        for sibling, candidate in zip(siblings, turn, strict=True):
            if candidate is None or candidate[0] not in free:
                continue
            number, peak = candidate
            like = pairs[found % len(pairs)][0]
            whole = table.piece(number, is_active=False)
            if whole.num_tokens < like.num_tokens or peak - whole.start >= like.num_tokens:
                continue
            free.remove(number)
            found += 1
            piece = cut(whole, like.num_tokens)
            yield NearPiece(piece=piece, acts=table.held_out.acts_on(sibling, piece.start, piece.stop), like=like)
