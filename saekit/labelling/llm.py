"""Explains and judges many features at once through one labelling model; each answer is on disk before the next step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saekit.labelling.asking import LabellingModel, ask_in_rounds
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.explain import Explainer, joined_label, llm_labeler
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import LEXICAL, Label, Score
from saekit.labelling.scoring.controls import NO_LABEL, Controls
from saekit.labelling.scoring.detection import PieceScorer
from saekit.labelling.scoring.pieces import Piece
from saekit.labelling.store import RecordFile
from saekit.progress import NO_PROGRESS, Progress, Task

__all__ = ["Questions", "ScoreJob", "explain_and_judge", "least_explained", "stand_in"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """One label, or one feature without, and one scorer."""

    scorer: PieceScorer
    label: Label
    pieces: list[Piece]
    is_control: bool
    """Whether the label is nobody's: a control, or none where the scorer needs none."""

    def request(self, attempt: int = 0) -> ChatRequest:
        """Returns the question; there must be pieces."""
        return self.scorer.request(self.label, self.pieces, attempt=attempt)

    @property
    def key(self) -> tuple[int, str, str]:
        """What its score is known by."""
        return self.label.feature, self.label.labeler, self.scorer.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """All that a labelling model is to be asked about one dictionary."""

    explainers: Sequence[Explainer]
    """One for each kind that asks."""
    scorers: Sequence[PieceScorer]
    """None of them: labels are not judged."""
    controls: Controls
    features: Sequence[int]
    config: LLMConfig

    @property
    def labelers(self) -> list[str]:
        """Names of those whose labels are written, in order."""
        return [llm_labeler(self.config, kind) for kind in self.config.explainers]

    @property
    def judged(self) -> list[str]:
        """Names of those whose labels the judge scores."""
        return [*self.labelers, *([LEXICAL] if self.config.judge_lexical else [])]

    def requests(self, labels: Sequence[Label] = ()) -> list[ChatRequest]:
        """Returns the first questions of explainers and scorers; `labels` that are not there yet are stood in for."""
        requests = [e.request(f) for e in self.explainers for f in self.features if e.has_evidence(f)]
        known = {(label.feature, label.labeler) for label in labels}
        stand_ins = [
            stand_in(feature, labeler)
            for labeler in self.judged
            for feature in self.features
            if (feature, labeler) not in known
        ]
        return requests + [job.request() for job in self.score_jobs([*labels, *stand_ins]) if job.pieces]

    def score_jobs(self, labels: Sequence[Label]) -> list[ScoreJob]:
        """Returns what the scorers are to be asked about labels that are done, about controls, and about features alone."""
        order = {labeler: number for number, labeler in enumerate(self.judged)}
        usable = {(label.feature, label.labeler): label for label in labels if label.status == "done"}
        # What another feature's label scores is seen on labels of the first of those judged.
        first = [label for (_, labeler), label in usable.items() if order.get(labeler) == 0]
        controlled = set(self.controls.drawn(self.features, self.config.num_controlled))
        jobs: list[ScoreJob] = []
        for scorer in self.scorers:
            for feature in self.features:
                pieces = scorer.pieces(feature)
                own = [usable[feature, name] for name in order if (feature, name) in usable]
                others = self.controls.labels(feature, first) if feature in controlled and pieces else []
                if not scorer.needs_label:
                    own, others = [], [Label(feature=feature, labeler=NO_LABEL)]
                jobs += [ScoreJob(scorer=scorer, label=label, pieces=pieces, is_control=False) for label in own]
                jobs += [ScoreJob(scorer=scorer, label=label, pieces=pieces, is_control=True) for label in others]
        return jobs


def stand_in(feature: int, labeler: str) -> Label:
    """Returns a label of the usual length in place of one that is not there yet, for estimates."""
    return Label(
        feature=feature,
        labeler=labeler,
        label="x" * 40,
        description="some words " * 25,
        fires_on="some words " * 15,
        promotes="some words " * 6,
        suppresses="some words " * 4,
    )


def explain_and_judge(
    model: LabellingModel,
    questions: Questions,
    *,
    labels: RecordFile[Label],
    scores: RecordFile[Score],
    controls: RecordFile[Score],
    progress: Progress = NO_PROGRESS,
) -> None:
    """Labels and judges; features already in the files are passed over, and answers in the ledger cost nothing.

    Args:
        controls: takes the scores of what is nobody's label.

    Raises:
        LabelerError: the model cannot be used, or a cap is reached; what was answered is in the files.
    """
    for explainer in questions.explainers:
        _explain(model, questions, explainer, labels, progress)
    if "concat" in questions.config.explainers:
        _join(questions, labels)
    _judge_all(model, questions, labels.records, scores, controls, progress)


def _explain(
    model: LabellingModel, questions: Questions, explainer: Explainer, labels: RecordFile[Label], progress: Progress
) -> None:
    known = {label.feature for label in labels.records if label.labeler == explainer.labeler}
    asked = [feature for feature in questions.features if explainer.has_evidence(feature)]
    left = [feature for feature in asked if feature not in known]

    with progress.task(f"explanations ({explainer.kind})", len(asked), "features", done=len(asked) - len(left)) as task:
        advance = _counted(model, task, done=len(asked) - len(left), total=len(asked))

        def take(feature: int, answers: Sequence[Answer], is_last: bool) -> bool:
            label = explainer.label(feature, answers, is_last=is_last)
            if label is not None:
                labels.extend([label])
                advance()
            return label is not None

        ask_in_rounds(
            model,
            left,
            request=lambda feature, attempt: explainer.request(feature, attempt=attempt),
            take=take,
            attempts=questions.config.attempts,
        )


def _join(questions: Questions, labels: RecordFile[Label]) -> None:
    labeler = llm_labeler(questions.config, "concat")
    known = {label.feature for label in labels.records if label.labeler == labeler}
    # In the order of the source.
    sources = [llm_labeler(questions.config, kind) for kind in ("vocabproj", "input", "tokenchange")]
    parts = {(label.feature, label.labeler): label for label in labels.records}
    for feature in questions.features:
        own = [parts[feature, source] for source in sources if (feature, source) in parts]
        if feature not in known and own:
            labels.extend([joined_label(feature, own, questions.config)])


def _judge_all(
    model: LabellingModel,
    questions: Questions,
    labels: Sequence[Label],
    scores: RecordFile[Score],
    controls: RecordFile[Score],
    progress: Progress,
) -> None:
    done = {(score.feature, score.labeler, score.scorer) for score in (*scores.records, *controls.records)}
    whole = questions.score_jobs(labels)
    left = [job for job in whole if job.key not in done]
    with progress.task("judgements", len(whole), "labels", done=len(whole) - len(left)) as task:
        advance = _counted(model, task, done=len(whole) - len(left), total=len(whole))

        def take(job: ScoreJob, answers: Sequence[Answer], is_last: bool) -> bool:
            score = job.scorer.score(job.label, job.pieces, answers, is_last=is_last)
            if score is not None:
                (controls if job.is_control else scores).extend([score])
                advance()
            return score is not None

        for job in left:
            if not job.pieces:
                take(job, [], True)
        ask_in_rounds(
            model,
            [job for job in left if job.pieces],
            request=lambda job, attempt: job.request(attempt),
            take=take,
            attempts=questions.config.attempts,
        )


def _counted(model: LabellingModel, task: Task, *, done: int, total: int) -> Callable[[], None]:
    """Returns what moves a bar by one, with rate, tokens and dollars beside it."""
    figures = model.figures(done=done, total=total)
    now = done

    def advance() -> None:
        nonlocal now
        now += 1
        task.advance(1, **figures(now))

    return advance


def least_explained(confidence: dict[int, float], *, num: int | None) -> list[int]:
    """Returns the `num` features whose token rules explain least, ascending; None: all."""
    order = sorted(confidence, key=lambda feature: (confidence[feature], feature))
    return sorted(order if num is None else order[:num])
