"""Scores many labels by a sentence embedding: a callable of the user's, or a server behind ledger and caps."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from saekit.labelling.asking import LabellingModel
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score
from saekit.labelling.scoring.controls import Controls
from saekit.labelling.scoring.embedding import Embed, EmbeddingConfig, EmbeddingScorer
from saekit.labelling.scoring.pieces import Piece
from saekit.labelling.store import RecordFile
from saekit.labelling.vectors import unpack_vectors
from saekit.progress import NO_PROGRESS, Progress

__all__ = ["EmbeddingQuestions", "server_config"]


def server_config(config: EmbeddingConfig, llm: LLMConfig | None) -> LLMConfig:
    """Returns how the embedding's server is asked: as the labelling model's, under the same caps.

    Raises:
        ConfigError: there is a cap in dollars and no price.
    """
    values = {} if llm is None else llm.to_dict()
    for key in ("price_cached_input", "backend", "tokenizer"):
        values.pop(key, None)
    price = {"price_input": config.price_input, "price_output": None if config.price_input is None else 0.0}
    own = {"model": config.model, "base_url": config.base_url, "api_key_env": config.api_key_env}
    return LLMConfig.parse({**values, **own, **price})


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingQuestions:
    """All labels that are to be scored."""

    scorer: EmbeddingScorer
    controls: Controls
    num_controlled: int

    def groups(self, labels: Sequence[Label], done: Iterable[Score] = ()) -> list[tuple[list[Label], list[Piece]]]:
        """Returns for each feature the labels that have no score yet, controls included, and its pieces."""
        known = {
            (score.feature, score.labeler)
            for score in done
            if score.scorer == "embedding" and score.judge == self.scorer.judge
        }
        by_feature: defaultdict[int, list[Label]] = defaultdict(list)
        for label in labels:
            if label.status == "done":
                by_feature[label.feature].append(label)
        controlled = set(self.controls.drawn(sorted(by_feature), self.num_controlled))
        first = min((label.labeler for own in by_feature.values() for label in own), default="")
        of_first = [label for own in by_feature.values() for label in own if label.labeler == first]
        found = []
        for feature, own in sorted(by_feature.items()):
            pieces = self.scorer.pieces(feature)
            others = self.controls.labels(feature, of_first) if feature in controlled and pieces else []
            left = [label for label in (*own, *others) if (feature, label.labeler) not in known]
            if left:
                found.append((left, pieces))
        return found

    def requests(self, labels: Sequence[Label], done: Iterable[Score] = ()) -> list[ChatRequest]:
        """Returns what a server would be asked."""
        return [self.scorer.request(own, pieces) for own, pieces in self.groups(labels, done) if pieces]

    def score(
        self,
        embed: Embed | LabellingModel,
        labels: Sequence[Label],
        *,
        scores: RecordFile[Score],
        controls: RecordFile[Score],
        progress: Progress = NO_PROGRESS,
    ) -> None:
        """Scores what has no score yet.

        Raises:
            LabelerError: the server cannot be used, a cap is reached, or vectors are unusable; what was scored is in the files.
        """
        groups = self.groups(labels, (*scores.records, *controls.records))
        with progress.task("embedding scores", len(groups), "features") as task:

            def take(own: list[Label], pieces: list[Piece], answer: Answer | None) -> None:
                vectors = None
                if answer is not None and answer.reply is not None:
                    vectors = unpack_vectors(answer.reply.text)
                elif answer is None and pieces and not isinstance(embed, LabellingModel):
                    vectors = embed(self.scorer.texts(own, pieces))
                found = self.scorer.scores(own, pieces, vectors)
                scores.extend(score for score in found if not score.labeler.startswith("control:"))
                controls.extend(score for score in found if score.labeler.startswith("control:"))
                task.advance(1)

            asked = isinstance(embed, LabellingModel)
            for own, pieces in groups:
                if not (asked and pieces):
                    take(own, pieces, None)
            if isinstance(embed, LabellingModel):
                waiting = {self.scorer.request(*group).key(): group for group in groups if group[1]}
                requests = [self.scorer.request(*group) for group in waiting.values()]
                embed.ask(requests, on_answer=lambda answer: take(*waiting[answer.request.key()], answer))
