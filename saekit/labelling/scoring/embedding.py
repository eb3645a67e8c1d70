"""Is a label nearer to texts on which the feature fires than to others? Asks a sentence embedding, not a judge.

It reads the same pieces as detection and sees no marks. The cheapest scorer of the LLM-free kind: one embedding of each piece
and label.

Source: embedding scoring as in EleutherAI's delphi; average precision in place of its AUROC, which extra and missing labels do
not lower.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from saekit.config import Config
from saekit.errors import LabelerError
from saekit.labelling.chat import ChatRequest
from saekit.labelling.records import Label, Score
from saekit.labelling.scoring.detection import described
from saekit.labelling.scoring.graded import score_graded
from saekit.labelling.scoring.pieces import Piece, PieceTable
from saekit.labelling.scoring.verdicts import Judged

__all__ = ["Embed", "EmbeddingConfig", "EmbeddingScorer"]

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""n texts -> their vectors [n, D], of any length."""


class EmbeddingConfig(Config):
    """Which sentence embedding scores labels, and on how many texts."""

    model: str
    """Its name as the server knows it; stands in the scores as judge."""
    base_url: str | None = None
    """Address of an OpenAI-compatible server up to `/v1`; None: OpenAI's own. Not used where a callable embeds."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a server with a `base_url` may need none."""
    num_pieces: int = Field(default=20, ge=2)
    """Held-out texts on which the feature fires, beside as many on which it does not."""
    price_input: float | None = Field(default=None, ge=0)
    """Dollars per million tokens; None: from the package's table, which knows OpenAI's models."""
    num_controlled: int = Field(default=20, ge=0)
    """Features for which three labels that know nothing are scored too: none, random words, another feature's."""
    seed: int = Field(default=0, ge=0)
    """Of the drawn texts and the controls."""


class EmbeddingScorer:
    """Scores labels of one feature at a time from one list of vectors."""

    def __init__(self, table: PieceTable, config: EmbeddingConfig) -> None:
        self._table = table
        self._config = config

    @property
    def judge(self) -> str:
        """Stands in the scores as judge."""
        return self._config.model

    def pieces(self, feature: int) -> list[Piece]:
        """Returns up to `num_pieces` active pieces and as many silent ones, in random order."""
        return self._table.mixed(feature, self._config.num_pieces, seed=self._config.seed)

    def texts(self, labels: Sequence[Label], pieces: Sequence[Piece]) -> list[str]:
        """Returns what is to be embedded, one line each: the pieces, then the labels."""
        return [
            *(self._table.text(piece) for piece in pieces),
            *(" ".join(described(label).split()) for label in labels),
        ]

    def request(self, labels: Sequence[Label], pieces: Sequence[Piece]) -> ChatRequest:
        """Returns the question for a server: all texts about one feature, one a line."""
        return ChatRequest(
            model=self._config.model,
            system="",
            user="\n".join(self.texts(labels, pieces)),
            schema_name="embedding",
            schema={},
            temperature=0.0,
            max_output_tokens=0,
            purpose="score:embedding",
            feature=labels[0].feature,
        )

    def scores(
        self, labels: Sequence[Label], pieces: Sequence[Piece], vectors: NDArray[np.float32] | None
    ) -> list[Score]:
        """Returns one score for each label from the vectors of `texts`; None: there are none. See `score_graded`.

        Raises:
            LabelerError: the vectors are not one finite row for each text.
        """
        if vectors is None or not pieces:
            return [self._score(label, pieces, None) for label in labels]
        num = len(pieces) + len(labels)
        vectors = np.asarray(vectors, dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != num or not np.isfinite(vectors).all():
            raise LabelerError(
                f"embedding {self._config.model!r}: got an array of shape {vectors.shape}, needs {num} rows of finite numbers"
            )
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        cosines = unit[len(pieces) :] @ unit[: len(pieces)].T  # [labels, pieces]
        return [self._score(label, pieces, row) for label, row in zip(labels, cosines, strict=True)]

    def _score(self, label: Label, pieces: Sequence[Piece], cosines: NDArray[np.float64] | None) -> Score:
        judged = Judged(
            scorer="embedding",
            judge=self._config.model,
            natural_rate=self._table.natural_rate(label.feature),
            indices=self._table.store_indices(pieces),
            seed=self._config.seed,
        )
        return score_graded(label, pieces, {} if cosines is None else dict(enumerate(cosines.tolist())), judged)
