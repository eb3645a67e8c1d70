"""Can a judge who reads only the label tell held-out texts on which the feature fires from others?

The pieces of text are cut from held-out documents at fixed places, without regard to where a feature fires, and nothing in
them is marked: neither position nor marks can give the answer away. Negatives are pieces on whose every token the feature was
seen to be silent.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from saekit.labelling.answers import UnusableAnswerError, parse_object, prompt_template, whole_number
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score
from saekit.labelling.scoring.rule import HeldOut

__all__ = ["JUDGE_PROMPT", "Judge", "Piece"]

JUDGE_PROMPT = "judge_v1"
PIECE_TOKENS = 32
MIN_PIECE_TOKENS = 8
NUM_BOOTSTRAP = 200

_SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {
        "answers": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"id": {"type": "integer"}, "active": {"type": "boolean"}},
                "required": ["id", "active"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["answers"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One piece of held-out text."""

    start: int
    """First place in the held-out table."""
    stop: int
    document: int
    """Document of the store."""
    is_active: bool
    """Whether the feature fires on any of its tokens."""


class Judge:
    """Asks about one label at a time."""

    def __init__(self, held_out: HeldOut, config: LLMConfig) -> None:
        self._held_out = held_out
        self._config = config
        self._system = prompt_template(JUDGE_PROMPT)
        table = held_out.table
        place = np.arange(len(table))
        begins = (place - table.segment_start) % PIECE_TOKENS == 0
        self._starts = np.flatnonzero(begins)
        self._stops = np.minimum(self._starts + PIECE_TOKENS, table.segment_end[self._starts] + 1)
        self._piece_of = np.cumsum(begins) - 1
        scored = np.add.reduceat(held_out.in_view.astype(np.int64), self._starts) if len(place) else self._starts
        # A token that was not encoded could hide a firing, so only pieces that were seen whole are used.
        self._is_whole = (scored == self._stops - self._starts) & (scored >= MIN_PIECE_TOKENS)

    def pieces(self, feature: int) -> list[Piece]:
        """Returns up to `num_judged` active pieces and as many silent ones, shuffled, from different documents if possible."""
        is_active = np.zeros(len(self._starts), dtype=bool)
        is_active[self._piece_of[self._held_out.firings(feature)]] = True
        generator = np.random.default_rng((self._config.seed, feature))
        positives = self._draw(np.flatnonzero(self._is_whole & is_active), self._config.num_judged, generator)
        negatives = self._draw(np.flatnonzero(self._is_whole & ~is_active), len(positives), generator)
        chosen = generator.permutation(np.concatenate([positives, negatives]))
        return [
            Piece(
                start=int(self._starts[piece]),
                stop=int(self._stops[piece]),
                document=int(self._held_out.table.documents[self._starts[piece]]),
                is_active=bool(is_active[piece]),
            )
            for piece in chosen
        ]

    def _draw(self, pieces: NDArray[np.int64], num: int, generator: np.random.Generator) -> NDArray[np.int64]:
        order = generator.permutation(pieces)
        documents = self._held_out.table.documents[self._starts[order]]
        _, first = np.unique(documents, return_index=True)
        is_first = np.zeros(len(order), dtype=bool)
        is_first[first] = True
        return np.concatenate([order[is_first], order[~is_first]])[:num]

    def request(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> ChatRequest:
        """Returns the question about a label, the same in every process."""
        table = self._held_out.table
        texts = [table.vocabulary.join(table.ids[piece.start : piece.stop].tolist()) for piece in pieces]
        numbered = [f"{number}. {' '.join(text.split())}" for number, text in enumerate(texts, start=1)]
        says = label.fires_on or label.label
        described = label.label if says == label.label else f"{label.label}\n{says}"
        return ChatRequest(
            model=self._config.model,
            system=self._system,
            user=f"Description: {described}\n\nPieces:\n" + "\n".join(numbered),
            schema_name="activity",
            schema=_SCHEMA,
            temperature=self._config.temperature,
            max_output_tokens=max(self._config.max_output_tokens, 40 + 20 * len(pieces)) * (2 if attempt else 1),
            attempt=attempt,
            purpose="judge",
            feature=label.feature,
            usual_answer=json.dumps({"answers": [{"id": n + 1, "active": False} for n in range(len(pieces))]}),
        )

    def score(self, label: Label, pieces: Sequence[Piece], answers: Sequence[Answer], *, is_last: bool) -> Score | None:
        """Returns the label's score from the last of the judge's answers; pieces without a usable one count as wrong.

        Args:
            answers: one for each attempt.
            is_last: there will be no other attempt.

        Returns:
            None: ask again.
        """
        reply = answers[-1].reply if answers else None
        verdicts = read_answers(reply.text, len(pieces)) if reply is not None else {}
        if reply is not None and len(verdicts) < len(pieces) and not is_last:
            return None
        return score_answers(label, pieces, verdicts, seed=self._config.seed)


def read_answers(text: str, num_pieces: int) -> dict[int, bool]:
    """Returns piece (from 0) -> verdict; pieces with no verdict, or two different ones, are left out."""
    try:
        listed = parse_object(text, needs="answers")["answers"]
    except UnusableAnswerError:
        return {}
    found: dict[int, set[bool]] = {}
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict):
            number, verdict = whole_number(entry.get("id")), _verdict(entry.get("active"))
            if number is not None and verdict is not None and 1 <= number <= num_pieces:
                found.setdefault(number - 1, set()).add(verdict)
    return {piece: verdicts.pop() for piece, verdicts in found.items() if len(verdicts) == 1}


def _verdict(value: JsonValue) -> bool | None:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words.get(str(value).strip().casefold())


def score_answers(label: Label, pieces: Sequence[Piece], answers: dict[int, bool], *, seed: int) -> Score:
    """Returns precision, recall, F1 with its interval over documents, and balanced accuracy."""
    active = np.array([piece.is_active for piece in pieces], dtype=bool)
    # A piece that got no verdict is counted as judged wrongly.
    says = np.array([answers.get(i, not piece.is_active) for i, piece in enumerate(pieces)], dtype=bool)
    documents = np.array([piece.document for piece in pieces], dtype=np.int64)
    num_positive, num_negative = int(active.sum()), int((~active).sum())
    is_judged = num_positive > 0 and bool(answers)
    hits = int((active & says).sum())
    recall = hits / num_positive if num_positive else 0.0
    specificity = float((~says[~active]).mean()) if num_negative else 0.0
    low, high = _interval(active, says, documents, seed=seed) if is_judged else (None, None)
    return Score(
        feature=label.feature,
        labeler=label.labeler,
        scorer="detection",
        f1=_f1(active, says) if is_judged else None,
        precision=hits / int(says.sum()) if is_judged and says.any() else None,
        recall=recall if is_judged else None,
        balanced_accuracy=(recall + specificity) / 2 if is_judged and num_negative else None,
        base_rate=num_positive / len(pieces) if pieces else None,
        num_positive=num_positive,
        num_negative=num_negative,
        num_unparsed=len(pieces) - len(answers),
        low=low,
        high=high,
    )


def _f1(active: NDArray[np.bool_], says: NDArray[np.bool_]) -> float:
    return 2 * float((active & says).sum()) / max(1, int(active.sum()) + int(says.sum()))


def _interval(
    active: NDArray[np.bool_], says: NDArray[np.bool_], documents: NDArray[np.int64], *, seed: int
) -> tuple[float | None, float | None]:
    """Returns the 95 % interval of F1 over resampled documents."""
    known, which = np.unique(documents, return_inverse=True)
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(known), np.full(len(known), 1 / len(known)), size=NUM_BOOTSTRAP)[:, which]
    hits, positives, said = draws @ (active & says), draws @ active, draws @ says
    defined = positives > 0
    f1 = 2 * hits[defined] / (positives[defined] + said[defined])
    low, high = np.quantile(f1, (0.025, 0.975)) if len(f1) else (np.nan, np.nan)
    return (float(low), float(high)) if np.isfinite(low) else (None, None)
