"""Can a judge who reads only the label tell right marks from wrong ones?

A positive is a held-out piece with marks on the tokens on which the feature is active. Each positive lends its marks, at the
same places of a piece of the same length, to one negative, where they stand on silent tokens. So every pattern of marks is
right as often as it is wrong, and whoever reads neither the label nor the words scores exactly chance. Every second negative
is a piece in which the feature is active elsewhere, if there is one: there the topic alone does not tell. A near negative has
marks on a sibling's strongest tokens, as many as the positive whose length it has.

Source: Paulo et al. 2024 (arXiv 2410.13928), "fuzzing"; the pairing is our own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.evidence.wording import MARK_ABOVE
from saekit.labelling.records import ScorerName
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.scoring.near import NearPiece
from saekit.labelling.scoring.pieces import Piece, cut

__all__ = ["Fuzzer"]


class Fuzzer(Judge):
    """Fuzzing: is the feature active on the marked tokens?"""

    name: ClassVar[ScorerName] = "fuzzing"
    prompt: ClassVar[str] = "fuzz_v1"

    def pieces(self, feature: int) -> list[Piece]:
        """Returns up to `num_judged` pieces with right marks and one with the same marks, wrong, for each; shuffled."""
        num = self._config.num_judged
        generator = np.random.default_rng((self._config.seed, feature))
        pairs, others = self._table.pairs(feature, num, generator, others=num)
        acts = np.zeros(len(self._table.held_out.table), dtype=np.float32)
        acts[self._table.held_out.firings(feature)] = self._table.held_out.activations(feature)
        # Where the feature fires elsewhere in the text.
        elsewhere = [self._table.piece(number, is_active=False) for number in others]
        right: list[tuple[Piece, Piece]] = []
        for number, (positive, silent) in enumerate(pairs):
            marked = _marked(acts[positive.start : positive.stop])
            negative = silent
            if number % 2 and (found := _first_fitting(elsewhere, marked, positive.num_tokens, acts)):
                elsewhere.remove(found)
                negative = cut(found, positive.num_tokens)
            right.append((replace(positive, marked=marked), replace(negative, marked=marked)))
        chosen = [piece for pair in right for piece in pair]
        chosen += islice(self.near(feature, right), self.num_near(len(pairs)))
        return [chosen[place] for place in generator.permutation(len(chosen))]

    def as_near(self, found: NearPiece) -> Piece | None:
        """Returns the piece with as many marks as its positive has, on a sibling's strongest tokens; None: too few are active."""
        num = len(found.like.marked)
        order = np.argsort(-found.acts, kind="stable")[:num]
        if len(order) < num or not found.acts[order].all():
            return None
        return replace(found.piece, marked=tuple(sorted(order.tolist())))

    def natural_rate(self, feature: int) -> float | None:
        """Returns the share of held-out tokens on which the feature fires: a mark set blindly is right so often."""
        held_out = self._table.held_out
        return len(held_out.firings(feature)) / held_out.num_tokens if held_out.num_tokens else None


def _marked(acts: NDArray[np.float32]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(acts > MARK_ABOVE * acts.max()).tolist())


def _first_fitting(
    pieces: Iterable[Piece], marked: Sequence[int], num_tokens: int, acts: NDArray[np.float32]
) -> Piece | None:
    """Returns the first piece that is long enough and silent at the marked places."""
    places = np.asarray(marked, dtype=np.int64)
    return next((p for p in pieces if p.num_tokens >= num_tokens and not acts[p.start + places].any()), None)
