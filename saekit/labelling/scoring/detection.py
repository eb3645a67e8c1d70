"""Can a judge who reads only the label tell held-out texts on which the feature fires from others?

The pieces of text are cut from held-out documents at fixed places, without regard to where a feature fires, and nothing in
them is marked: neither position nor marks can give the answer away, and negatives are as long as positives. Negatives are
pieces on whose every token the feature was seen to be silent.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar, Protocol

import numpy as np
from pydantic import JsonValue

from saekit.labelling.answers import prompt_template
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.near import NearPiece, near_pieces
from saekit.labelling.scoring.pieces import Piece, PieceTable
from saekit.labelling.scoring.verdicts import Judged, read_answers, score_answers, with_near

__all__ = ["Judge", "PieceScorer", "answers_schema", "described"]


class PieceScorer(Protocol):
    """Asks a labelling model about a feature's held-out pieces."""

    name: ClassVar[ScorerName]
    needs_label: ClassVar[bool]
    """Whether it is a label that is scored, and not the feature itself."""

    @property
    def needs_reading(self) -> bool:
        """Whether the model has to say how likely the tokens of a text are that it reads."""

    def pieces(self, feature: int) -> list[Piece]:
        """Returns what is asked about; none where the feature fires in too few pieces."""

    def requests(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> list[ChatRequest]:
        """Returns the questions about a label, the same in every process."""

    def score(self, label: Label, pieces: Sequence[Piece], answers: Sequence[Answer], *, is_last: bool) -> Score | None:
        """Returns the score from the last of the answers; what has no usable one counts as wrong.

        Args:
            answers: those of each attempt, one after the other.
            is_last: there will be no other attempt.

        Returns:
            None: ask again.
        """


def answers_schema(key: str, says: JsonValue) -> dict[str, JsonValue]:
    """Returns the JSON schema of a list with a number and one answer for each item."""
    item: dict[str, JsonValue] = {
        "type": "object",
        "properties": {"id": {"type": "integer"}, key: says},
        "required": ["id", key],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"answers": {"type": "array", "items": item}},
        "required": ["answers"],
        "additionalProperties": False,
    }


def described(label: Label) -> str:
    """Returns what a judge reads of a label: its input side."""
    says = label.fires_on or label.label
    return (label.label if says == label.label else f"{label.label}\n{says}") or "(none)"


class Judge:
    """Detection: which pieces is the feature active in?"""

    name: ClassVar[ScorerName] = "detection"
    needs_label: ClassVar[bool] = True
    needs_reading: ClassVar[bool] = False
    prompt: ClassVar[str] = "judge_v1"

    def __init__(
        self, table: PieceTable, config: LLMConfig, *, siblings: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        """Takes each feature's siblings, nearest first; without any there are no near negatives."""
        self._table = table
        self._config = config
        self._siblings = siblings or {}
        self._system = prompt_template(self.prompt)

    def pieces(self, feature: int) -> list[Piece]:
        """Returns up to `num_judged` active pieces and as many silent ones, shuffled, from different documents if possible.

        Near negatives are among them. None where the feature is active, or silent, in all pieces: there is nothing to tell apart.
        """
        generator = np.random.default_rng((self._config.seed, feature))
        pairs, _ = self._table.pairs(feature, self._config.num_judged, generator)
        chosen = [piece for pair in pairs for piece in pair]
        chosen += islice(self.near(feature, pairs), self.num_near(len(pairs)))
        return [chosen[place] for place in generator.permutation(len(chosen))]

    def num_near(self, num_pairs: int) -> int:
        """Returns the number of near negatives beside so many pairs."""
        return round(self._config.near_share * num_pairs)

    def near(self, feature: int, pairs: Sequence[tuple[Piece, Piece]]) -> Iterator[Piece]:
        """Yields near negatives as they are judged, for as long as there are any."""
        for found in near_pieces(self._table, feature, self._siblings.get(feature, ()), pairs=pairs):
            piece = self.as_near(found)
            if piece is not None:
                yield replace(piece, is_near=True)

    def as_near(self, found: NearPiece) -> Piece | None:
        """Returns a near negative as it is judged; None where it is of no use."""
        return found.piece

    def natural_rate(self, feature: int) -> float | None:
        """Returns the share of positives among all held-out pieces."""
        return self._table.natural_rate(feature)

    def request(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> ChatRequest:
        """Returns the one question."""
        numbered = [f"{number}. {self._table.text(piece)}" for number, piece in enumerate(pieces, start=1)]
        return ChatRequest(
            model=self._config.model,
            system=self._system,
            user=f"Description: {described(label)}\n\nPieces:\n" + "\n".join(numbered),
            schema_name="activity",
            schema=answers_schema("active", {"type": "boolean"}),
            temperature=self._config.temperature,
            max_output_tokens=max(self._config.max_output_tokens, 40 + 20 * len(pieces)) * (2 if attempt else 1),
            attempt=attempt,
            purpose=f"score:{self.name}",
            feature=label.feature,
            usual_answer=json.dumps({"answers": [{"id": n + 1, "active": False} for n in range(len(pieces))]}),
        )

    def requests(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> list[ChatRequest]:
        """See `PieceScorer.requests`."""
        return [self.request(label, pieces, attempt=attempt)]

    def score(self, label: Label, pieces: Sequence[Piece], answers: Sequence[Answer], *, is_last: bool) -> Score | None:
        """See `PieceScorer.score`."""
        reply = answers[-1].reply if answers else None
        verdicts = read_answers(reply.text, len(pieces)) if reply is not None else {}
        if reply is not None and len(verdicts) < len(pieces) and not is_last:
            return None
        judged = Judged(
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            natural_rate=self.natural_rate(label.feature),
            indices=self._table.store_indices([piece for piece in pieces if not piece.is_near]),
            seed=self._config.seed,
        )
        own, near = ([place for place, piece in enumerate(pieces) if piece.is_near == side] for side in (False, True))
        of_own = {number: verdicts[place] for number, place in enumerate(own) if place in verdicts}
        score = score_answers(label, [pieces[place] for place in own], of_own, judged)
        return with_near(score, [verdicts.get(place) for place in near])
