"""Does a model expect a held-out text more if it has read the label before? Asks no question: the model only reads.

A piece's score is what the label saves: the text's negative log-likelihood after an empty description less that after the label,
in nats per token. The text, its length and what stands around the description are the same in both.

Source: surprisal scoring as in EleutherAI's delphi; average precision in place of its AUROC, which extra and missing labels do
not lower.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from saekit.labelling.answers import prompt_template
from saekit.labelling.chat import Answer, ChatReply, ChatRequest
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.detection import described
from saekit.labelling.scoring.graded import score_graded
from saekit.labelling.scoring.pieces import Piece, PieceTable
from saekit.labelling.scoring.verdicts import Judged

__all__ = ["SurprisalScorer", "text_logprob"]

MARK = "\n\nText:\n"
"""What stands between description and text; ASCII, so that it comes back as it went whatever the tokenizer."""
NOTHING = "nothing in particular"


class SurprisalScorer:
    """Surprisal: how much likelier does the label make the text?"""

    name: ClassVar[ScorerName] = "surprisal"
    needs_label: ClassVar[bool] = True
    needs_reading: ClassVar[bool] = True
    prompt: ClassVar[str] = "surprisal_v1"

    def __init__(self, table: PieceTable, config: LLMConfig) -> None:
        self._table = table
        self._config = config
        self._template = prompt_template(self.prompt).strip()

    def pieces(self, feature: int) -> list[Piece]:
        """Returns up to `num_judged` active pieces and as many silent ones, in random order."""
        return self._table.mixed(feature, self._config.num_judged, seed=self._config.seed)

    def requests(self, label: Label, pieces: Sequence[Piece], *, attempt: int = 0) -> list[ChatRequest]:
        """See `PieceScorer.requests`: every text after the label, then every text after none, which all labels share."""
        says = " ".join(described(label).split())
        return [self._read(label.feature, text, piece) for text in (says, NOTHING) for piece in pieces]

    def _read(self, feature: int, says: str, piece: Piece) -> ChatRequest:
        head = self._template.replace("{description}", says)
        text = f"{head}\n{self._table.text(piece)}"
        return ChatRequest.reading(self._config.model, text, purpose=f"score:{self.name}", feature=feature)

    def score(self, label: Label, pieces: Sequence[Piece], answers: Sequence[Answer], *, is_last: bool) -> Score | None:
        """See `PieceScorer.score`; a text that could not be read is not read again."""
        found = [None if answer.reply is None else text_logprob(answer.reply) for answer in answers]
        after, before = found[: len(pieces)], found[len(pieces) : 2 * len(pieces)]
        saved = {
            place: (with_label - without) / piece.num_tokens
            for place, (piece, with_label, without) in enumerate(zip(pieces, after, before, strict=False))
            if with_label is not None and without is not None
        }
        judged = Judged(
            scorer=self.name,
            judge=self._config.model,
            prompt_version=self.prompt,
            natural_rate=self._table.natural_rate(label.feature),
            indices=self._table.store_indices(pieces),
            seed=self._config.seed,
        )
        sides = [
            [saved[i] for i, piece in enumerate(pieces) if i in saved and piece.is_active == s] for s in (True, False)
        ]
        gain = float(np.mean(sides[0]) - np.mean(sides[1])) if all(sides) else None
        return score_graded(label, pieces, saved, judged).model_copy(update={"gain": gain})


def text_logprob(reply: ChatReply, *, mark: str = MARK) -> float | None:
    """Returns the log-likelihood of what stands behind a mark in a text that was read, in nats.

    None where the mark is not in the tokens that came back, nothing stands behind it, or a token there has no number.
    """
    joined = "".join(token.text for token in reply.logprobs)
    at = joined.rfind(mark)
    if at < 0:
        return None
    border, place, total = at + len(mark), 0, 0.0
    is_empty = True
    for token in reply.logprobs:
        place += len(token.text)
        # A token that reaches over the border is counted: it holds some of the text.
        if place <= border or not token.text:
            continue
        if token.logprob is None:
            return None
        total, is_empty = total + token.logprob, False
    return None if is_empty else total
