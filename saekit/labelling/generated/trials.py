"""Questions of which one label needs several, each by itself: what one of them shows would give another's answer away."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from saekit.labelling.asking import LabellingModel, ask_in_rounds
from saekit.labelling.chat import Answer, ChatRequest
from saekit.labelling.generated.interventiongain import InterventionReader
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.records import Label, Score, ScorerName
from saekit.labelling.scoring.controls import Controls
from saekit.labelling.store import RecordFile
from saekit.labelling.textreading import probe_request, why_unread
from saekit.progress import NO_PROGRESS, Progress

__all__ = ["TrialQuestions", "TrialScorer"]


class TrialScorer(Protocol):
    """Asks a labelling model about one label in several trials."""

    name: ClassVar[ScorerName]
    needs_reading: ClassVar[bool]
    """Whether a judge has to say how likely the tokens of a text are that it reads."""
    prompt: str
    """Name of its prompt."""

    def num_trials(self, feature: int) -> int:
        """Returns how many questions there are about a label of a feature; 0: none can be asked."""

    def others(self, feature: int) -> set[int]:
        """Returns the features that a judge sees beside this one, whose labels so are no control for it."""

    def request(self, label: Label, trial: int, *, attempt: int = 0) -> ChatRequest:
        """Returns one question, the same in every process."""

    def is_usable(self, label: Label, answer: Answer) -> bool:
        """Returns whether an answer can be read."""

    def score(self, label: Label, answers: Sequence[Answer]) -> Score:
        """Returns the score from the last answer of each trial; what cannot be read counts as wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    scorer: TrialScorer
    label: Label

    @property
    def num_trials(self) -> int:
        return self.scorer.num_trials(self.label.feature)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialQuestions:
    """All that is asked in trials about the labels of one dictionary."""

    scorers: Sequence[TrialScorer]
    controls: Controls
    features: Sequence[int]
    judged: Sequence[str]
    """Names of those whose labels are scored, in order."""
    config: LLMConfig
    setup: str = ""
    """See `Score.setup`."""

    def requests(self, labels: Sequence[Label], *, done: Iterable[Score] = ()) -> list[ChatRequest]:
        """Returns the first questions about labels, some of which may be stand-ins, and about controls.

        Args:
            done: scores that are not asked for again.
        """
        known = {_key(score) for score in done}
        left = [job for job in self._jobs(labels)[0] if self._key(job) not in known]
        probes = [probe_request(self.config.model)] if any(scorer.needs_reading for scorer in self.scorers) else []
        return probes + [job.scorer.request(job.label, trial) for job in left for trial in range(job.num_trials)]

    def answerable(self, model: LabellingModel, progress: Progress = NO_PROGRESS) -> "TrialQuestions":
        """Returns the questions that the model can answer; where it gives no logprobs of texts that it reads, says so in one line.

        Raises:
            LabelerError: the model cannot be used, or a cap is reached.
        """
        if not any(scorer.needs_reading for scorer in self.scorers):
            return self
        reason = why_unread(model)
        if reason is None:
            return self
        progress.say(f"no logprobs of a text that is read, so intervention is asked as a choice ({reason})")
        written = [s.in_writing() if isinstance(s, InterventionReader) else s for s in self.scorers]
        return replace(self, scorers=written)

    def is_stale(self, score: Score) -> bool:
        """Returns whether a score is of the same judge and scorer on other texts."""
        is_asked = score.judge == self.config.model and score.scorer in {scorer.name for scorer in self.scorers}
        is_own = score.labeler in self.judged or "control:" in score.labeler
        return is_asked and is_own and score.setup != self.setup

    def score(
        self,
        model: LabellingModel,
        labels: Sequence[Label],
        *,
        scores: RecordFile[Score],
        controls: RecordFile[Score],
        progress: Progress = NO_PROGRESS,
    ) -> None:
        """Asks about all labels that are done and have no score yet, and scores them.

        Raises:
            LabelerError: the model cannot be used, or a cap is reached; what was answered is in the ledger.
        """
        self.answerable(model, progress)._score(model, labels, scores, controls, progress)

    def _score(
        self,
        model: LabellingModel,
        labels: Sequence[Label],
        scores: RecordFile[Score],
        controls: RecordFile[Score],
        progress: Progress,
    ) -> None:
        known = {_key(score) for score in (*scores.records, *controls.records)}
        jobs, num_own = self._jobs(labels)
        left = [(job, number >= num_own) for number, job in enumerate(jobs) if self._key(job) not in known]
        answers = self._asked(model, [job for job, _ in left], progress)
        with progress.task("scores of generated texts", len(jobs), "labels", done=len(jobs) - len(left)) as task:
            for number, (job, is_control) in enumerate(left):
                found = [answers[number, trial] for trial in range(job.num_trials)]
                score = job.scorer.score(job.label, found).model_copy(update={"setup": self.setup})
                (controls if is_control else scores).extend([score])
                task.advance(1)

    def _key(self, job: _Job) -> tuple[object, ...]:
        """Returns what a job's score is known by."""
        feature, labeler = job.label.feature, job.label.labeler
        return feature, labeler, job.scorer.name, self.config.model, job.scorer.prompt, self.setup

    def _jobs(self, labels: Sequence[Label]) -> tuple[list[_Job], int]:
        """Returns what is scored, the controls last, and how many come before them."""
        usable = {(label.feature, label.labeler): label for label in labels if label.status == "done"}
        first = [label for (_, labeler), label in usable.items() if labeler == self.judged[0]] if self.judged else []
        controlled = set(self.controls.drawn(self.features, self.config.num_controlled))
        own: list[_Job] = []
        others: list[_Job] = []
        for scorer in self.scorers:
            for feature in self.features:
                found = [usable[feature, name] for name in self.judged if (feature, name) in usable]
                own += [_Job(scorer=scorer, label=label) for label in found]
                if feature in controlled and scorer.num_trials(feature):
                    shown = scorer.others(feature)
                    unseen = [label for label in first if label.feature not in shown]
                    others += [_Job(scorer=scorer, label=label) for label in self.controls.labels(feature, unseen)]
        return own + others, len(own)

    def _asked(self, model: LabellingModel, jobs: Sequence[_Job], progress: Progress) -> dict[tuple[int, int], Answer]:
        """Returns the last answer to each trial of each job."""
        trials = [(number, trial) for number, job in enumerate(jobs) for trial in range(job.num_trials)]
        last: dict[tuple[int, int], Answer] = {}
        with progress.task("questions about generated texts", len(trials), "questions") as task:
            figures = model.figures(done=0, total=len(trials))

            def request(at: tuple[int, int], attempt: int) -> ChatRequest:
                job = jobs[at[0]]
                return job.scorer.request(job.label, at[1], attempt=attempt)

            def take(at: tuple[int, int], answers: Sequence[Answer], is_last: bool) -> bool:
                job, answer = jobs[at[0]], answers[-1]
                if answer.reply is not None and not is_last and not job.scorer.is_usable(job.label, answer):
                    return False
                last[at] = answer
                task.advance(1, **figures(len(last)))
                return True

            ask_in_rounds(model, trials, request=request, take=take, attempts=self.config.attempts)
        return last


def _key(score: Score) -> tuple[object, ...]:
    return score.feature, score.labeler, score.scorer, score.judge, score.prompt_version, score.setup
