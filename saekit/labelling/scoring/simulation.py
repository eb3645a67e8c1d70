"""Can a judge who reads only the label say how strongly the feature is active on each token of held-out texts?

Predictions of all tokens of all pieces are correlated with the true activations together: a mean of correlations of single texts
would leave out the texts on which the feature is silent. The pieces are those of detection, drawn without regard to strength.

Source: Bills et al. 2023 (Language models can explain neurons in language models), "simulation" and its all-at-once form.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from saekit.labelling.answers import prompt_template
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.correlation import calibrated_r2, pearson, pearson_interval
from saekit.labelling.scoring.detection import described
from saekit.labelling.scoring.graded import score_graded
from saekit.labelling.scoring.pieces import Piece, PieceTable
from saekit.labelling.scoring.simulated import LEVELS, PLACEHOLDER, read_placeholders, written_values
from saekit.labelling.scoring.verdicts import Judged

__all__ = ["Simulator"]

MOST = float(len(LEVELS) - 1)
TOKENS_PER_NUMBER = 8
"""Of an answer, by tokenizers that take an entry to pieces."""


class Simulator:
    """Simulation: how strongly is the feature active on each token?"""

    name: ClassVar[ScorerName] = "simulation"
    needs_label: ClassVar[bool] = True

    def __init__(self, table: PieceTable, config: LLMConfig) -> None:
        self._table = table
        self._config = config
        self.prompt = "simulate_v1" if config.simulation_form == "written" else "simulate_once_v1"
        self._system = prompt_template(self.prompt)

    @property
    def needs_reading(self) -> bool:
        """See `PieceScorer.needs_reading`."""
        return self._config.simulation_form == "all_at_once"

    def in_writing(self) -> "Simulator":
        """Returns the same for a model that reads no texts."""
        return Simulator(self._table, self._config.model_copy(update={"simulation_form": "written"}))

    def pieces(self, feature: int) -> list[Piece]:
        """Returns up to `num_simulated` active pieces and as many silent ones, in random order."""
        return self._table.mixed(feature, self._config.num_simulated, seed=self._config.seed)

    def requests(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> list[ChatRequest]:
        """See `PieceScorer.requests`."""
        num = sum(piece.num_tokens for piece in pieces)
        says = "Description: " + " ".join(described(label).split())
        if self.needs_reading:
            user = "\n\n".join([self._system.rstrip(), says, *self._listed(pieces, behind=PLACEHOLDER)])
            return [self._request(label, "", user, num=0, attempt=0, reads=True)]
        user = "\n\n".join([says, *self._listed(pieces, behind="")])
        return [self._request(label, self._system, user, num=num, attempt=attempt, reads=False)]

    def _request(self, label: Label, system: str, user: str, *, num: int, attempt: int, reads: bool) -> ChatRequest:
        numbers = [str(number) for number in range(1, num + 1)]
        return ChatRequest(
            model=self._config.model,
            system=system,
            user=user,
            schema_name="activations",
            schema={
                "type": "object",
                "properties": {number: {"type": "integer", "enum": list(range(len(LEVELS)))} for number in numbers},
                "required": [*numbers],
                "additionalProperties": False,
            }
            if num
            else {},
            temperature=0.0 if reads else self._config.temperature,
            max_output_tokens=1
            if reads
            else max(self._config.max_output_tokens, 40 + TOKENS_PER_NUMBER * num) * (2 if attempt else 1),
            attempt=attempt,
            purpose=f"score:{self.name}",
            feature=label.feature,
            usual_answer="" if reads else json.dumps(dict.fromkeys(numbers, 0)),
            choices=LEVELS,
            reads=reads,
        )

    def _listed(self, pieces: Sequence[Piece], *, behind: str) -> list[str]:
        """Returns one paragraph for each piece, one token a line: with its number over all pieces, or something behind it."""
        table, paragraphs, number = self._table.held_out.table, [], 0
        for place, piece in enumerate(pieces, start=1):
            lines = [f"Piece {place}"]
            for token in table.ids[piece.start : piece.stop].tolist():
                number += 1
                text = _shown(table.vocabulary.text(token))
                lines.append(f"{text}{behind}" if behind else f"{number} {text}")
            paragraphs.append("\n".join(lines))
        return paragraphs

    def score(self, label: Label, pieces: Sequence[Piece], answers: Sequence[Answer], *, is_last: bool) -> Score | None:
        """See `PieceScorer.score`."""
        borders = np.cumsum([0, *(piece.num_tokens for piece in pieces)])
        num = int(borders[-1])
        reply = answers[-1].reply if answers else None
        values: dict[int, float] = {}
        if reply is not None:
            values = read_placeholders(reply.logprobs, num) if self.needs_reading else written_values(reply, num)
            if len(values) < num and not is_last and not self.needs_reading:
                return None
        spans = [range(int(low), int(high)) for low, high in pairwise(borders)]
        whole = [all(token in values for token in span) for span in spans]
        rate = self._table.natural_rate(label.feature)
        judged = Judged(
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            natural_rate=rate,
            indices=self._table.store_indices(pieces),
            seed=self._config.seed,
        )
        graded = {i: max(values[token] for token in span) for i, span in enumerate(spans) if whole[i]}
        score = score_graded(label, pieces, graded, judged)
        if not graded:
            return score
        # A piece with a token that got no number counts as predicted in the worst way, as it does for F1.
        worst = [0.0 if piece.is_active else MOST for piece in pieces]
        predicted = np.concatenate(
            [
                np.array(
                    [values[token] for token in span] if whole[i] else np.full(len(span), worst[i]), dtype=np.float64
                )
                for i, span in enumerate(spans)
            ]
        )
        return score.model_copy(update=self._figures(label.feature, pieces, predicted, rate))

    def _figures(
        self, feature: int, pieces: Sequence[Piece], predicted: NDArray[np.float64], rate: float | None
    ) -> dict[str, float | None]:
        held_out, lengths = self._table.held_out, [piece.num_tokens for piece in pieces]
        true = np.concatenate([held_out.acts_on(feature, p.start, p.stop) for p in pieces]).astype(np.float64)
        active = np.array([piece.is_active for piece in pieces], dtype=bool)
        low, high = pearson_interval(
            predicted, true, np.repeat([piece.document for piece in pieces], lengths), seed=self._config.seed
        )
        natural = None
        if rate is not None and active.any() and not active.all():
            weight = np.where(active, rate / active.sum(), (1 - rate) / (~active).sum())
            natural = pearson(predicted, true, np.repeat(weight, lengths))
        half = np.repeat(np.arange(len(pieces)) % 2 == 0, lengths)
        return {
            "pearson": pearson(predicted, true, np.ones(len(true))),
            "pearson_low": low,
            "pearson_high": high,
            "pearson_natural": natural,
            "r2": calibrated_r2(predicted, true, half),
        }


def _shown(text: str) -> str:
    """Returns a token as one quoted line; what is no whole character by name, as its bytes cannot be shown alone."""
    return "(part of a character)" if "\ufffd" in text else json.dumps(text, ensure_ascii=False)
