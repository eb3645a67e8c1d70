"""Explains and judges many features at once through one labelling model; each answer is on disk before the next step."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from saekit.labelling.asking import LabellingModel, ask_in_rounds
from saekit.labelling.candidates import Selection, explain_best
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.explain import Explainer, joined_label, llm_labeler
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import LEXICAL, Label, Score
from saekit.labelling.scoring.controls import NO_LABEL, Controls
from saekit.labelling.scoring.detection import PieceScorer
from saekit.labelling.scoring.pieces import Piece
from saekit.labelling.scoring.scorers import without_reading
from saekit.labelling.store import RecordFile
from saekit.labelling.textreading import probe_request, why_unread
from saekit.progress import NO_PROGRESS, Progress, Task

__all__ = [
    "Questions",
    "ScoreJob",
    "answerable",
    "explain_and_judge",
    "explain_features",
    "join_labels",
    "judge",
    "least_explained",
    "stand_in",
]

FEATURES_AT_ONCE = 500
"""Features whose candidates are asked for, and chosen among, together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """One label, or one feature without, and one scorer."""

    scorer: PieceScorer
    label: Label
    pieces: list[Piece]
    is_control: bool
    """Whether the label is nobody's: a control, or none where the scorer needs none."""

    def requests(self, attempt: int = 0) -> list[ChatRequest]:
        """Returns the questions; there must be pieces."""
        return self.scorer.requests(self.label, self.pieces, attempt=attempt)


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
    setup: str = ""
    """See `Score.setup`."""
    scored: Sequence[str] | None = None
    """Names of those whose labels are judged; None: those that the config's explainers write."""
    selection: Selection | None = None
    """Chooses among several candidates; None: each feature is asked about once."""

    @property
    def labelers(self) -> list[str]:
        """Names of those whose labels are written, in order."""
        return [llm_labeler(self.config, kind) for kind in self.config.explainers]

    @property
    def judged(self) -> list[str]:
        """Names of those whose labels the judge scores."""
        if self.scored is not None:
            return list(self.scored)
        return [*self.labelers, *([LEXICAL] if self.config.judge_lexical else [])]

    def key(self, job: ScoreJob) -> tuple[object, ...]:
        """Returns what a job's score is known by."""
        return job.label.feature, job.label.labeler, job.scorer.name, self.config.model, self.setup

    def requests(self, labels: Sequence[Label] = ()) -> list[ChatRequest]:
        """Returns the first questions of explainers and scorers; `labels` that are not there yet are stood in for."""
        known = {(label.feature, label.labeler) for label in labels}
        requests: list[ChatRequest] = []
        for explainer in self.explainers:
            asked = [feature for feature in self.features if explainer.has_evidence(feature)]
            requests += [explainer.request(f, candidate=n) for f in asked for n in range(self.config.num_candidates)]
            left = [feature for feature in asked if (feature, explainer.labeler) not in known]
            requests += self._selecting(left, explainer.labeler)
        stand_ins = [
            stand_in(feature, labeler)
            for labeler in self.judged
            for feature in self.features
            if (feature, labeler) not in known
        ]
        return requests + self.judging([*labels, *stand_ins])

    def judging(self, labels: Sequence[Label], *, done: Iterable[Score] = ()) -> list[ChatRequest]:
        """Returns the first questions of scorers about labels that are there; `done`: scores that are not asked for again."""
        known = {_key(score) for score in done}
        left = [job for job in self.score_jobs(labels) if job.pieces and self.key(job) not in known]
        probes = [probe_request(self.config.model)] if any(scorer.needs_reading for scorer in self.scorers) else []
        return probes + [request for job in left for request in job.requests()]

    def _selecting(self, features: Sequence[int], labeler: str) -> list[ChatRequest]:
        """Returns the questions by which the best of labels that are not there yet would be chosen."""
        if self.selection is None:
            return []
        pieces = {feature: found for feature in features if (found := self.selection.scorer.pieces(feature))}
        return [
            self.selection.request(stand_in(feature, f"{labeler} {number}"), found)
            for feature, found in pieces.items()
            for number in range(self.config.num_candidates)
        ]

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
    """Returns a label of the usual length in place of one that is not there yet, for estimates; no two are alike, as labels are."""
    name = f"{feature} {labeler} "
    return Label(
        feature=feature,
        labeler=labeler,
        label=name.ljust(40, "x"),
        description=(name + "some words " * 25),
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
    questions = answerable(model, questions, progress)
    for explainer in questions.explainers:
        explain_features(model, explainer, questions.features, labels, selection=questions.selection, progress=progress)
    if "concat" in questions.config.explainers:
        join_labels(questions.features, questions.config, labels)
    judge(model, questions, labels.records, scores=scores, controls=controls, progress=progress)


def answerable(model: LabellingModel, questions: Questions, progress: Progress = NO_PROGRESS) -> Questions:
    """Returns the questions that the model can answer; where it gives no logprobs of texts that it reads, says so in one line.

    Raises:
        LabelerError: the model cannot be used, or a cap is reached.
    """
    reading = [scorer.name for scorer in questions.scorers if scorer.needs_reading]
    if not reading:
        return questions
    reason = why_unread(model)
    if reason is None:
        return questions
    left = without_reading(questions.scorers)
    written = [scorer.name for scorer in left if scorer.name in reading]
    dropped = [name for name in reading if name not in written]
    parts = [*(f"{name} is left out" for name in dropped), *(f"{name} is asked for in writing" for name in written)]
    progress.say(f"no logprobs of a text that is read, so {' and '.join(parts)} ({reason})")
    return replace(questions, scorers=left)


def explain_features(
    model: LabellingModel,
    explainer: Explainer,
    features: Sequence[int],
    labels: RecordFile[Label],
    *,
    selection: Selection | None = None,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Labels the features that an explainer has evidence about; those whose labels are in the file are passed over.

    Args:
        selection: chooses the best of several; None: one is asked for.

    Raises:
        LabelerError: the model cannot be used, or a cap is reached; what was answered is in the file.
    """
    known = {label.feature for label in labels.records if label.labeler == explainer.labeler}
    asked = [feature for feature in features if explainer.has_evidence(feature)]
    left = [feature for feature in asked if feature not in known]

    with progress.task(f"explanations ({explainer.kind})", len(asked), "features", done=len(asked) - len(left)) as task:
        advance = _counted(model, task, done=len(asked) - len(left), total=len(asked))

        def take(feature: int, answers: Sequence[Answer], is_last: bool) -> bool:
            label = explainer.label(feature, answers, is_last=is_last)
            if label is not None:
                labels.extend([label])
                advance()
            return label is not None

        if selection is not None:
            for start in range(0, len(left), FEATURES_AT_ONCE):
                best = explain_best(model, explainer, left[start : start + FEATURES_AT_ONCE], selection)
                labels.extend(best.values())
                for _ in best:
                    advance()
            return
        ask_in_rounds(
            model,
            left,
            request=lambda feature, attempt: explainer.request(feature, attempt=attempt),
            take=take,
            attempts=model.config.attempts,
        )


def join_labels(features: Sequence[int], config: LLMConfig, labels: RecordFile[Label]) -> None:
    """Writes the `concat` ensemble of the features that have labels to be joined."""
    labeler = llm_labeler(config, "concat")
    known = {label.feature for label in labels.records if label.labeler == labeler}
    # In the order of the source.
    sources = [llm_labeler(config, kind) for kind in ("vocabproj", "input", "tokenchange")]
    parts = {(label.feature, label.labeler): label for label in labels.records}
    for feature in features:
        own = [parts[feature, source] for source in sources if (feature, source) in parts]
        if feature not in known and own:
            labels.extend([joined_label(feature, own, config)])


def judge(
    model: LabellingModel,
    questions: Questions,
    labels: Sequence[Label],
    *,
    scores: RecordFile[Score],
    controls: RecordFile[Score],
    progress: Progress = NO_PROGRESS,
) -> None:
    """Judges labels that are there; those with a score of the same judge and setup are passed over.

    Raises:
        LabelerError: the model cannot be used, or a cap is reached; what was answered is in the files.
    """
    done = {_key(score) for score in (*scores.records, *controls.records)}
    whole = questions.score_jobs(labels)
    left = [job for job in whole if questions.key(job) not in done]
    with progress.task("judgements", len(whole), "labels", done=len(whole) - len(left)) as task:
        advance = _counted(model, task, done=len(whole) - len(left), total=len(whole))

        def take(job: ScoreJob, answers: Sequence[Answer], is_last: bool) -> bool:
            score = job.scorer.score(job.label, job.pieces, answers, is_last=is_last)
            if score is not None:
                score = score.model_copy(update={"setup": questions.setup})
                (controls if job.is_control else scores).extend([score])
                advance()
            return score is not None

        for job in left:
            if not job.pieces:
                take(job, [], True)
        ask_in_rounds(
            model,
            [job for job in left if job.pieces],
            request=lambda job, attempt: job.requests(attempt),
            take=take,
            attempts=questions.config.attempts,
        )


def _key(score: Score) -> tuple[object, ...]:
    return score.feature, score.labeler, score.scorer, score.judge, score.setup


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
