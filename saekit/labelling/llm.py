"""Explains and judges many features at once through one server, in any order, each answer on disk before the next step."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from saekit.errors import LabelerError
from saekit.labelling.chat import ChatRequest, LLMConfig
from saekit.labelling.evidence.effects import TokenEffects
from saekit.labelling.explain import Explainer, llm_labeler
from saekit.labelling.ledger import RecordedClient, SpentError
from saekit.labelling.records import LEXICAL, Label, Score
from saekit.labelling.scoring.detection import Judge
from saekit.labelling.store import RecordFile
from saekit.progress import NO_PROGRESS, Progress

__all__ = ["EffectsOf", "LLMEstimate", "Questions", "explain_and_judge", "least_explained"]

EffectsOf = Callable[[int], TokenEffects | None]
"""Feature -> the token effects to show for it."""
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True)
class LLMEstimate:
    """What a run would ask for if every first answer is usable; nothing is sent to find out."""

    num_requests: int
    input_tokens: int
    output_tokens: int
    """The most that the answers may take."""
    cost: float | None
    """None without prices."""

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", at most {self.cost:.4f} in the prices' currency"
        return (
            f"{self.num_requests:,} requests, about {self.input_tokens:,} input and at most "
            f"{self.output_tokens:,} output tokens{cost}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """All that a labelling model is to be asked about one dictionary."""

    explainer: Explainer
    judge: Judge | None
    """None: labels are not judged."""
    effects: EffectsOf
    features: Sequence[int]
    config: LLMConfig

    def estimate(self) -> LLMEstimate:
        """Returns what they would cost, from the very prompts."""
        requests: list[ChatRequest] = []
        for feature in self.features:
            requests.append(self.explainer.request(feature, self.effects(feature)))
            pieces = self.judge.pieces(feature) if self.judge is not None else []
            if self.judge is not None and pieces:
                # The label is not known yet; a sentence stands in for it.
                stand_in = Label(feature=feature, labeler=llm_labeler(self.config), label="x" * 40, fires_on="x" * 160)
                requests += [self.judge.request(stand_in, pieces)] * (2 if self.config.judge_lexical else 1)
        input_tokens = sum(request.estimated_input_tokens() for request in requests)
        output_tokens = sum(request.max_output_tokens for request in requests)
        return LLMEstimate(
            num_requests=len(requests),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cost=self.config.cost(input_tokens, output_tokens),
        )


def explain_and_judge(
    client: RecordedClient,
    questions: Questions,
    *,
    labels: RecordFile[Label],
    scores: RecordFile[Score],
    progress: Progress = NO_PROGRESS,
) -> None:
    """Labels and judges; features already in the files are passed over, and answers in the ledger cost nothing.

    Raises:
        LabelerError: the server cannot be used, or a cap is reached; what was answered is in the files.
    """

    async def everything() -> None:
        try:
            await _explain_all(client, questions, labels, progress)
            await _judge_all(client, questions, labels.records, scores, progress)
        finally:
            await client.close()

    _run(everything())


async def _explain_all(
    client: RecordedClient, questions: Questions, labels: RecordFile[Label], progress: Progress
) -> None:
    features, config = questions.features, questions.config
    known = {label.feature for label in labels.records if label.labeler == llm_labeler(config)}
    left = [feature for feature in features if feature not in known]
    with progress.task("explanations", len(features), "features", done=len(features) - len(left)) as task:

        async def explain(feature: int) -> None:
            labels.extend([await questions.explainer.label(client, feature, questions.effects(feature))])
            task.advance(1)

        await _in_parallel(left, explain, config.concurrency)


async def _judge_all(
    client: RecordedClient,
    questions: Questions,
    labels: Sequence[Label],
    scores: RecordFile[Score],
    progress: Progress,
) -> None:
    judge, config = questions.judge, questions.config
    if judge is None:
        return
    wanted = set(questions.features)
    judged = {llm_labeler(config)} | ({LEXICAL} if config.judge_lexical else set())
    done = {(score.feature, score.labeler) for score in scores.records if score.scorer == "detection"}
    whole = [
        label for label in labels if label.status == "done" and label.feature in wanted and label.labeler in judged
    ]
    left = [label for label in whole if (label.feature, label.labeler) not in done]
    with progress.task("judgements", len(whole), "labels", done=len(whole) - len(left)) as task:

        async def score(label: Label) -> None:
            scores.extend([await judge.score(client, label)])
            task.advance(1)

        await _in_parallel(left, score, config.concurrency)


async def _in_parallel(jobs: Sequence[JobT], work: Callable[[JobT], Awaitable[None]], concurrency: int) -> None:
    """Runs `work` on every job, `concurrency` at a time; the first error ends it.

    A spent cap lets the answers on their way arrive, as they are paid for; any other error drops them.
    """
    waiting = iter(jobs)
    spent: list[SpentError] = []

    async def worker() -> None:
        for job in waiting:
            if spent:
                return
            try:
                await work(job)
            except SpentError as error:
                spent.append(error)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(jobs))):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        raise _first(errors) from errors
    if spent:
        raise spent[0]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns the error to show of several that came at once: a labeler's own if there is one."""
    own = errors.subgroup(LabelerError)
    group = own if own is not None else errors
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _run(coroutine: Coroutine[None, None, ResultT]) -> ResultT:
    """Runs a coroutine to its end, also where a notebook's event loop already runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    outcome: list[ResultT] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target, name="saekit-llm")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def least_explained(confidence: dict[int, float], *, num: int | None) -> list[int]:
    """Returns the `num` features whose token rules explain least, ascending; None: all."""
    order = sorted(confidence, key=lambda feature: (confidence[feature], feature))
    return sorted(order if num is None else order[:num])
