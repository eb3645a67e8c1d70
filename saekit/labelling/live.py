"""Questions one by one, as many at a time as the server takes: repeated, slowed down, given up, or the end of the run."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from saekit.errors import LabelerError, SaekitError
from saekit.labelling.chat import ChatReply, ChatRequest, Desk, SpentError
from saekit.labelling.client import EmptyError, LostError, OpenAIClient, RefusedError, UnreachableError
from saekit.labelling.dialect import Complaint, Dialect, retry_after
from saekit.labelling.llmconfig import LLMConfig
from saekit.labelling.pace import Pace
from saekit.labelling.textreading import ReadingDialect

__all__ = ["OpenAIChat", "OpenAIEmbeddings"]

MAX_RATE_LIMIT_WAITS = 200
FIRST_TRIES = 2
"""Server errors borne before a plainer answer format is tried, on a server that has not answered in this format yet."""
_TOO_MUCH = {429, 503, 529}


class OpenAIChat:
    """A `ChatClient` for any server that speaks OpenAI's chat completions."""

    def __init__(self, config: LLMConfig) -> None:
        """See `OpenAIClient` for what it checks."""
        self._config = config
        self._client = OpenAIClient(config)
        self._dialect = Dialect()
        self._reading = ReadingDialect()
        self._pace = Pace(config.concurrency, max_hold_seconds=10 * config.max_wait_seconds)
        self._lost_in_a_row = 0

    async def answer(self, requests: Sequence[ChatRequest], desk: Desk) -> None:
        """See `ChatClient.answer`; the first error that ends the run lets the answers on their way arrive."""
        run = _Run(desk=desk, waiting=iter(requests))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._config.concurrency, len(requests))):
                group.create_task(self._worker(run))
        if run.ends:
            raise run.ends[0]

    async def close(self) -> None:
        """See `ChatClient.close`."""
        await self._client.close()

    async def _call(self, request: ChatRequest, options: Mapping[str, object]) -> tuple[ChatReply, Mapping[str, str]]:
        return await (self._client.read if request.reads else self._client.chat)(request, options)

    def _dialect_of(self, request: ChatRequest) -> Dialect:
        return self._reading if request.reads else self._dialect

    async def _worker(self, run: "_Run") -> None:
        for request in run.waiting:
            if run.ends:
                return
            try:
                await self._one(request, run)
            except SaekitError as error:
                run.ends.append(error)

    async def _one(self, request: ChatRequest, run: "_Run") -> None:
        dialect = self._dialect_of(request)
        answer_format = dialect.format
        while True:
            try:
                reply = await self._with_repeats(request, answer_format, run)
            except (RefusedError, LostError, UnreachableError) as error:
                if run.ends:
                    # Cut short in its repeats: neither answered nor failed.
                    return
                plainer = self._plainer(error, dialect, answer_format)
                if plainer is None:
                    self._give_up(request, error, run.desk)
                    return
                answer_format = plainer
                continue
            self._lost_in_a_row = 0
            for notice in (dialect.accepted(answer_format), dialect.missing_logprobs(request, reply)):
                if notice:
                    run.desk.say(f"{self._client.where}: {notice}")
            run.desk.answered(request, reply)
            return

    def _plainer(self, error: Exception, dialect: Dialect, answer_format: int) -> int | None:
        if not isinstance(error, RefusedError):
            return None
        return dialect.adapted(error.complaint, answer_format, sent=error.sent)

    def _give_up(self, request: ChatRequest, error: Exception, desk: Desk) -> None:
        """Fails one request, or raises what ends the run."""
        if isinstance(error, UnreachableError):
            raise self._client.unreachable(error) from error
        verdict = error.complaint.verdict if isinstance(error, RefusedError) else "later"
        if request.reads and isinstance(error, RefusedError) and self._reading.cannot(error.complaint):
            verdict = "never"
        if isinstance(error, RefusedError) and verdict in {"stop", "rate"}:
            raise self._client.stopped(error.complaint) from error
        desk.failed(request, f"{self._client.where}: {error}")
        self._lost_in_a_row += verdict == "later"
        if self._lost_in_a_row >= self._config.give_up_after:
            raise LabelerError(
                f"{self._client.where}: {self._lost_in_a_row} requests in a row got no answer, needs a server that answers; "
                "run again with --retry-failed"
            ) from error

    async def _with_repeats(self, request: ChatRequest, answer_format: int, run: "_Run") -> ChatReply:
        failures = rate_limits = 0

        def pause(error: Exception) -> bool | float:
            nonlocal failures, rate_limits
            if run.ends or not isinstance(error, RefusedError | LostError | UnreachableError):
                return False
            complaint = error.complaint if isinstance(error, RefusedError) else None
            if complaint is not None and complaint.verdict == "rate":
                rate_limits += 1
                goes_on = rate_limits <= MAX_RATE_LIMIT_WAITS
            elif complaint is None or complaint.verdict == "later":
                failures += 1
                most = self._config.max_retries
                is_settled = complaint is None or self._dialect_of(request).is_settled(answer_format)
                goes_on = failures <= (most if is_settled else min(FIRST_TRIES, most))
            else:
                goes_on = False
            wanted = _wanted_pause(complaint)
            return goes_on and (True if wanted is None else min(wanted, 10 * self._config.max_wait_seconds))

        async for attempt in self._client.tries(pause):
            with attempt:
                return await self._paced(request, answer_format, run)
        raise AssertionError("tries end with a result or an error")

    async def _paced(self, request: ChatRequest, answer_format: int, run: "_Run") -> ChatReply:
        while True:
            async with self._pace.slot(sum(request.most_tokens())) as sent_in:
                if run.ends:
                    raise run.ends[0]
                try:
                    run.desk.sending(request)
                except SpentError as error:
                    if not (error.may_fit_later and run.num_open):
                        raise
                else:
                    return await self._sent(request, answer_format, sent_in, run)
            await run.landing.wait()

    async def _sent(self, request: ChatRequest, answer_format: int, sent_in: int, run: "_Run") -> ChatReply:
        options = self._dialect_of(request).options(request, answer_format)
        run.num_open += 1
        try:
            reply, headers = await self._call(request, options)
        except (RefusedError, LostError, UnreachableError) as error:
            run.desk.unanswered(request, _charged(error))
            complaint = None
            if isinstance(error, RefusedError):
                complaint, error.sent = error.complaint, options
                self._pace.told(complaint.headers)
            if complaint is None or complaint.status in _TOO_MUCH:
                self._pace.congested(sent_in, _wanted_pause(complaint))
            raise
        finally:
            run.landed()
        self._pace.told(headers)
        self._pace.answered()
        return reply


class OpenAIEmbeddings(OpenAIChat):
    """The same for a server's embeddings: the lines of a question are its texts, an answer is their vectors."""

    async def _call(self, request: ChatRequest, options: Mapping[str, object]) -> tuple[ChatReply, Mapping[str, str]]:
        return await self._client.embed(request)


@dataclass(kw_only=True, slots=True)
class _Run:
    """One call of `answer`."""

    desk: Desk
    waiting: Iterator[ChatRequest]
    ends: list[SaekitError] = field(default_factory=list)
    """What ends it; once there is anything, nothing more is sent."""
    num_open: int = 0
    """Requests that are on their way."""
    landing: asyncio.Event = field(default_factory=asyncio.Event)
    """Wakes those who wait for room under a cap."""

    def landed(self) -> None:
        """One more is no longer on its way; what it took is in the ledger before anybody who waits can look."""
        self.num_open -= 1
        self.landing.set()
        self.landing.clear()


def _wanted_pause(complaint: Complaint | None) -> float | None:
    return None if complaint is None else retry_after(complaint.headers)


def _charged(error: Exception) -> tuple[int, int] | None:
    """Returns the tokens that a request without an answer was charged; None where nobody knows."""
    if isinstance(error, EmptyError | RefusedError):
        return error.charged
    return None if isinstance(error, LostError) else (0, 0)
