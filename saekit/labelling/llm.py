"""Explains and judges many features at once through one labelling model; each answer is on disk before the next step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saekit.labelling.asking import LabellingModel, ask_in_rounds
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.explain import Explainer, joined_label, llm_labeler
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import LEXICAL, Label, Score
from saekit.labelling.scoring.detection import Judge, Piece
from saekit.labelling.store import RecordFile
from saekit.progress import NO_PROGRESS, Progress, Task

__all__ = ["Questions", "explain_and_judge", "least_explained"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """All that a labelling model is to be asked about one dictionary."""

    explainers: Sequence[Explainer]
    """One for each kind that asks."""
    judge: Judge | None
    """None: labels are not judged."""
    features: Sequence[int]
    config: LLMConfig

    @property
    def labelers(self) -> list[str]:
        """Names of those whose labels are written, in order."""
        return [llm_labeler(self.config, kind) for kind in self.config.explainers]

    def requests(self, labels: Sequence[Label] = ()) -> list[ChatRequest]:
        """Returns the first questions of the explainers and of the judge; `labels` that are not there yet are stood in for."""
        requests = [e.request(f) for e in self.explainers for f in self.features if e.has_evidence(f)]
        if self.judge is None:
            return requests
        known = {(label.feature, label.labeler): label for label in labels}
        for feature in self.features:
            pieces = self.judge.pieces(feature)
            for labeler in self.judged if pieces else ():
                stand_in = Label(feature=feature, labeler=labeler, label="x" * 40, fires_on="some words " * 15)
                label = known.get((feature, labeler), stand_in)
                if label.status == "done":
                    requests.append(self.judge.request(label, pieces))
        return requests

    @property
    def judged(self) -> list[str]:
        """Names of those whose labels the judge scores."""
        return [*self.labelers, *([LEXICAL] if self.config.judge_lexical else [])]


def explain_and_judge(
    model: LabellingModel,
    questions: Questions,
    *,
    labels: RecordFile[Label],
    scores: RecordFile[Score],
    progress: Progress = NO_PROGRESS,
) -> None:
    """Labels and judges; features already in the files are passed over, and answers in the ledger cost nothing.

    Raises:
        LabelerError: the model cannot be used, or a cap is reached; what was answered is in the files.
    """
    for explainer in questions.explainers:
        _explain(model, questions, explainer, labels, progress)
    if "concat" in questions.config.explainers:
        _join(questions, labels)
    if questions.judge is not None:
        _judge_all(model, questions, questions.judge, labels.records, scores, progress)


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
    judge: Judge,
    labels: Sequence[Label],
    scores: RecordFile[Score],
    progress: Progress,
) -> None:
    wanted = set(questions.features)
    done = {(score.feature, score.labeler) for score in scores.records if score.scorer == "detection"}
    whole = [
        label
        for label in labels
        if label.status == "done" and label.feature in wanted and label.labeler in questions.judged
    ]
    left = [label for label in whole if (label.feature, label.labeler) not in done]
    with progress.task("judgements", len(whole), "labels", done=len(whole) - len(left)) as task:
        advance = _counted(model, task, done=len(whole) - len(left), total=len(whole))

        def take(job: tuple[Label, list[Piece]], answers: Sequence[Answer], is_last: bool) -> bool:
            score = judge.score(*job, answers, is_last=is_last)
            if score is not None:
                scores.extend([score])
                advance()
            return score is not None

        jobs = [(label, judge.pieces(label.feature)) for label in left]
        for job in jobs:
            if not job[1]:
                take(job, [], True)
        ask_in_rounds(
            model,
            [job for job in jobs if job[1]],
            request=lambda job, attempt: judge.request(*job, attempt=attempt),
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
