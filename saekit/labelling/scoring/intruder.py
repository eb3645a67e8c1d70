"""Do the texts on which a feature fires have anything in common that a judge can see? Needs no label: a bound for all of them.

Each group has four held-out pieces in which the feature fires and one in which it is silent, all of one length, in random
order; no piece is shown twice, as one that came back would be known to be no intruder.

Source: intruder detection as in EleutherAI's delphi.
"""

import json
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from saekit.labelling.answers import prompt_template
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.detection import answers_schema
from saekit.labelling.scoring.pieces import PIECE_TOKENS, Piece, PieceTable
from saekit.labelling.scoring.verdicts import listed_answers, wilson

__all__ = ["IntruderJudge"]

GROUP = 5
LETTERS = "abcde"


class IntruderJudge:
    """Intruder detection: which of five pieces is the silent one? Chance is 1 in 5."""

    name: ClassVar[ScorerName] = "intruder"
    needs_label: ClassVar[bool] = False
    needs_reading: ClassVar[bool] = False
    prompt: ClassVar[str] = "intruder_v1"

    def __init__(self, table: PieceTable, config: LLMConfig) -> None:
        self._table = table
        self._config = config
        self._system = prompt_template(self.prompt)

    def pieces(self, feature: int) -> list[Piece]:
        """Returns up to `num_judged` groups of five pieces, one group after the other; `is_active` is false for the intruder."""
        generator = np.random.default_rng((self._config.seed, feature))
        full = (side[self._table.lengths[side] == PIECE_TOKENS] for side in self._table.sides(feature))
        active, silent = (self._table.shuffled(side, generator) for side in full)
        num = min(self._config.num_judged, len(active) // (GROUP - 1), len(silent))
        chosen: list[Piece] = []
        for number in range(num):
            # Strided, so that neighbours in the order of documents come into different groups.
            group = [
                self._table.piece(int(piece), is_active=True) for piece in active[number : num * (GROUP - 1) : num]
            ]
            intruder = self._table.piece(int(silent[number]), is_active=False)
            group.insert(int(generator.integers(GROUP)), intruder)
            chosen += group
        return chosen

    def request(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> ChatRequest:
        """Returns the one question; of the label only the feature's number is used."""
        num = len(pieces) // GROUP
        lines = [
            f"Group {number + 1}\n"
            + "\n".join(
                f"({letter}) {self._table.text(piece)}"
                for letter, piece in zip(LETTERS, pieces[number * GROUP : (number + 1) * GROUP], strict=True)
            )
            for number in range(num)
        ]
        return ChatRequest(
            model=self._config.model,
            system=self._system,
            user="\n\n".join(lines),
            schema_name="intruders",
            schema=answers_schema("intruder", {"type": "string", "enum": list(LETTERS)}),
            temperature=self._config.temperature,
            max_output_tokens=max(self._config.max_output_tokens, 40 + 20 * num) * (2 if attempt else 1),
            attempt=attempt,
            purpose=f"score:{self.name}",
            feature=label.feature,
            usual_answer=json.dumps({"answers": [{"id": n + 1, "intruder": "a"} for n in range(num)]}),
        )

    def requests(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> list[ChatRequest]:
        """See `PieceScorer.requests`."""
        return [self.request(label, pieces, attempt=attempt)]

    def score(self, label: Label, pieces: Sequence[Piece], answers: Sequence[Answer], *, is_last: bool) -> Score | None:
        """See `PieceScorer.score`."""
        num = len(pieces) // GROUP
        reply = answers[-1].reply if answers else None
        named = read_intruders(reply.text, num) if reply is not None else {}
        if reply is not None and len(named) < num and not is_last:
            return None
        right = tuple(number in named and not pieces[number * GROUP + named[number]].is_active for number in range(num))
        is_judged = bool(named)
        low, high = wilson(sum(right), num) if is_judged else (None, None)
        return Score(
            feature=label.feature,
            labeler=label.labeler,
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            accuracy=sum(right) / num if is_judged else None,
            base_rate=1 / GROUP,
            num_positive=num,
            num_unparsed=num - len(named),
            low=low,
            high=high,
            pieces=self._table.store_indices(pieces[::GROUP]),
            right=right if is_judged else (),
        )


def read_intruders(text: str, num_groups: int) -> dict[int, int]:
    """Returns group (from 0) -> place of the named intruder; groups with none, or two different ones, are left out."""
    found: dict[int, int] = {}
    for group, values in listed_answers(text, num_groups, key="intruder").items():
        letters = {str(value).strip(" ().").casefold() for value in values}
        if len(letters) == 1 and (letter := letters.pop()) in tuple(LETTERS):
            found[group] = LETTERS.index(letter)
    return found
