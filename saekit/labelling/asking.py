"""Asks a labelling model through its ledger and its caps: `ask(requests) -> answers` is all that explainers and scorers need."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from saekit.labelling.chat import Answer, Ask, ChatClient, ChatReply, ChatRequest, SpentError
from saekit.labelling.ledger import Ledger
from saekit.labelling.llmconfig import LLMConfig
from saekit.progress import NO_PROGRESS, Progress

__all__ = ["LabellingModel", "ask_in_rounds"]

JOBS_AT_ONCE = 20_000
"""Jobs whose questions are in memory together: some 5 KB each."""
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


class LabellingModel:
    """One model behind a ledger and a budget.

    Every answer is on disk before anybody sees it; a request that is in the ledger is never sent again.
    """

    def __init__(
        self, client: ChatClient, ledger: Ledger, config: LLMConfig, *, progress: Progress = NO_PROGRESS
    ) -> None:
        self.ledger = ledger
        self.config = config
        self._client = client
        self._progress = progress
        self._num_unanswered = 0
        interrupted = ledger.count_interrupted()
        if interrupted:
            progress.say(
                f"labelling model {config.model!r}: {interrupted} requests were on their way when the last run was stopped; "
                "they count as spent for the caps, and are asked again"
            )

    def ask(
        self, requests: Sequence[ChatRequest], *, on_answer: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """See `Ask.ask`."""
        desk = _Desk(self.ledger, self.config, self._progress, on_answer, on_unanswered=self._count_unanswered)
        wanted = {request.key(): request for request in requests}
        left = [request for key, request in wanted.items() if not desk.knows(key, request)]
        if left:

            async def all_of_them() -> None:
                try:
                    await self._client.answer(left, desk)
                finally:
                    await self._client.close()

            _run(all_of_them())
        return [desk.answers[request.key()] for request in requests]

    def _count_unanswered(self) -> None:
        self._num_unanswered += 1

    def figures(self, *, done: int, total: int) -> Callable[[int], dict[str, float | str]]:
        """Returns what to show beside a bar that starts at `done`: done -> its figures now.

        They are requests/s, requests on their way, those that got no answer and were sent again or given up, tokens, and dollars so far and at the bar's end.
        """
        ledger, started = self.ledger, time.monotonic()
        sent_before, cost_before = ledger.num_sent, ledger.answered.cost

        def shown(now: int) -> dict[str, float | str]:
            rate = (ledger.num_sent - sent_before) / max(time.monotonic() - started, 1e-9)
            values: dict[str, float | str] = {
                "requests/s": round(rate, 1),
                "in flight": str(ledger.open.requests),
                **({"unanswered": str(self._num_unanswered)} if self._num_unanswered else {}),
                "tokens": f"{ledger.answered.input + ledger.answered.output:,}",
            }
            if self.config.prices is not None:
                each = (ledger.answered.cost - cost_before) / max(1, now - done)
                values["cost"] = (
                    f"${ledger.answered.cost:.4f} of about ${ledger.answered.cost + each * (total - now):.4f}"
                )
            return values

        return shown


def ask_in_rounds(
    model: Ask,
    jobs: Sequence[JobT],
    *,
    request: Callable[[JobT, int], ChatRequest | Sequence[ChatRequest]],
    take: Callable[[JobT, Sequence[Answer], bool], bool],
    attempts: int,
) -> None:
    """Asks about many jobs at once, and again about those whose answers cannot be used.

    Args:
        request: (job, attempt) -> the question, or all of several; jobs may share some.
        take: (job, its answers so far, whether this was the last attempt) -> whether the job is done with; called when all answers
            of an attempt are there, in the order of their questions. Must be true for a request that failed, and after the last
            attempt.
        attempts: the most times that one job is asked about.

    Raises:
        SpentError, LabelerError: see `Ask.ask`; jobs whose answers have arrived are taken.
    """
    for start in range(0, len(jobs), JOBS_AT_ONCE):
        _ask_some(model, jobs[start : start + JOBS_AT_ONCE], request=request, take=take, attempts=attempts)


def _ask_some(
    model: Ask,
    jobs: Sequence[JobT],
    *,
    request: Callable[[JobT, int], ChatRequest | Sequence[ChatRequest]],
    take: Callable[[JobT, Sequence[Answer], bool], bool],
    attempts: int,
) -> None:
    so_far: dict[int, list[Answer]] = {index: [] for index in range(len(jobs))}
    for attempt in range(attempts):
        questions = {index: _several(request(jobs[index], attempt)) for index in so_far}
        keys_of = {index: [question.key() for question in own] for index, own in questions.items()}
        waiting = {index: set(keys) for index, keys in keys_of.items()}
        indices_of: dict[str, list[int]] = {}
        for index, keys in waiting.items():
            for key in keys:
                indices_of.setdefault(key, []).append(index)
        arrived: dict[str, Answer] = {}

        def on_answer(
            answer: Answer,
            *,
            attempt: int = attempt,
            keys_of: dict[int, list[str]] = keys_of,
            waiting: dict[int, set[str]] = waiting,
            indices_of: dict[str, list[int]] = indices_of,
            arrived: dict[str, Answer] = arrived,
        ) -> None:
            key = answer.request.key()
            arrived[key] = answer
            for index in indices_of[key]:
                waiting[index].discard(key)
                if waiting[index]:
                    continue
                so_far[index] += [arrived[own] for own in keys_of[index]]
                if take(jobs[index], so_far[index], attempt == attempts - 1):
                    del so_far[index]

        model.ask([question for own in questions.values() for question in own], on_answer=on_answer)


def _several(questions: ChatRequest | Sequence[ChatRequest]) -> list[ChatRequest]:
    return [questions] if isinstance(questions, ChatRequest) else list(questions)


class _Desk:
    """Where a client reports to during one `ask`."""

    def __init__(
        self,
        ledger: Ledger,
        config: LLMConfig,
        progress: Progress,
        on_answer: Callable[[Answer], None] | None,
        *,
        on_unanswered: Callable[[], None],
    ) -> None:
        self.answers: dict[str, Answer] = {}
        self.ledger = ledger
        self.config = config
        self._progress = progress
        self._on_answer = on_answer
        self._on_unanswered = on_unanswered
        self._input_factor = 1.0

    def knows(self, key: str, request: ChatRequest) -> bool:
        """Returns whether the ledger has the answer, and hands it out if so."""
        known = self.ledger.find(key)
        if known is None:
            return False
        reply, reason = (None, known) if isinstance(known, str) else (known, "")
        self._hand_out(Answer(request=request, reply=reply, reason=reason))
        return True

    def sending(self, request: ChatRequest, *, batch: str | None = None) -> None:
        """See `Desk.sending`."""
        input_tokens, output_tokens = request.most_tokens()
        most = (int(input_tokens * self._input_factor), output_tokens)
        self._check_caps(most)
        self.ledger.send(request, most, batch=batch)

    def unanswered(self, request: ChatRequest, tokens: tuple[int, int] | None) -> None:
        """See `Desk.unanswered`."""
        self._on_unanswered()
        self.ledger.drop(request.key(), tokens, cost=None if tokens is None else self.config.cost(*tokens))

    def answered(self, request: ChatRequest, reply: ChatReply) -> None:
        """See `Desk.answered`."""
        cost = self.config.cost(reply.input_tokens, reply.output_tokens, cached_tokens=reply.cached_tokens)
        reply = dataclasses.replace(reply, cost=cost)
        # A tokenizer that needs more than was allowed for must not carry later requests past a cap.
        self._input_factor = max(self._input_factor, reply.input_tokens / request.most_tokens()[0])
        self.ledger.record(request.key(), reply)
        self._hand_out(Answer(request=request, reply=reply))

    def failed(self, request: ChatRequest, reason: str) -> None:
        """See `Desk.failed`."""
        self.ledger.fail(request, reason)
        self._hand_out(Answer(request=request, reason=reason))

    def say(self, message: str) -> None:
        """See `Desk.say`."""
        self._progress.say(message)

    def _hand_out(self, answer: Answer) -> None:
        self.answers[answer.request.key()] = answer
        if self._on_answer is not None:
            self._on_answer(answer)

    def _check_caps(self, most: tuple[int, int]) -> None:
        ledger, config = self.ledger, self.config
        if config.max_requests is not None and ledger.num_sent >= config.max_requests:
            raise SpentError(
                f"labelling model: {ledger.num_sent} requests sent, max_requests {config.max_requests} allows no more; "
                "raise it to go on"
            )
        tokens = [part.input + part.output for part in (ledger.answered, ledger.wasted, ledger.lost, ledger.open)]
        if config.max_tokens is not None and sum(tokens) + sum(most) > config.max_tokens:
            raise SpentError(
                f"labelling model: {sum(tokens[:2]):,} tokens spent, the next request could pass max_tokens "
                f"{config.max_tokens:,}; raise it to go on",
                may_fit_later=sum(tokens[:3]) + sum(most) <= config.max_tokens,
            )
        paid = ledger.answered.cost + ledger.wasted.cost
        certain = paid + self._cost(ledger.lost.input + most[0], ledger.lost.output + most[1])
        if (
            config.max_cost is not None
            and certain + self._cost(ledger.open.input, ledger.open.output) > config.max_cost
        ):
            raise SpentError(
                f"labelling model: ${paid:.4f} spent, the next request could pass max_cost {config.max_cost:g}; "
                "raise it to go on",
                may_fit_later=certain <= config.max_cost,
            )

    def _cost(self, input_tokens: int, output_tokens: int) -> float:
        return self.config.cost(input_tokens, output_tokens) or 0.0


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
