"""OpenAI's Batch API: many requests in one file, answered within a day at half the price.

Source: OpenAI, "Batch API" guide and API reference. A batch's tag is written to the ledger before it is created, and stands in
its metadata: after a kill at any moment the same command finds the batch again instead of paying for another.
"""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import JsonValue

from saekit.errors import LabelerError
from saekit.labelling.answers import whole_number
from saekit.labelling.chat import ChatReply, ChatRequest, Desk, SpentError
from saekit.labelling.client import BatchState, LostError, OpenAIClient, RefusedError, UnreachableError
from saekit.labelling.dialect import Complaint, Dialect, read_completion, retry_after
from saekit.labelling.llmconfig import LLMConfig

__all__ = ["OpenAIBatch"]

TAG_KEY = "saekit_batch"
OVER = {"completed", "failed", "expired", "cancelled"}
NEWEST = 1000
"""Batches of the account among which one is looked for whose creation was not seen to succeed."""
ResultT = TypeVar("ResultT")


@dataclass(slots=True)
class _Line:
    """A request on its way through batches."""

    request: ChatRequest
    format: int
    sent: Mapping[str, object]
    """Options that it was last sent with."""
    tries: int = 0


class OpenAIBatch:
    """A `ChatClient` that asks in batches; which requests are in which batch stands in the desk's ledger."""

    def __init__(self, config: LLMConfig) -> None:
        """See `OpenAIClient` for what it checks."""
        self._config = config
        self._client = OpenAIClient(config)
        self._dialect = Dialect()
        self._largest = config.batch.max_requests
        self._end: LabelerError | None = None

    async def close(self) -> None:
        """See `ChatClient.close`."""
        await self._client.close()

    async def answer(self, requests: Sequence[ChatRequest], desk: Desk) -> None:
        """See `ChatClient.answer`; batches that a former run left open are waited for first."""
        for request in requests:
            if request.reads:
                desk.failed(request, f"{self._client.where}: batches of chats give no logprobs of a text that is read")
        now = self._dialect.format
        lines = {r.key(): _Line(r, now, self._dialect.options(r, now)) for r in requests if not r.reads}
        running = await self._reopened(desk)
        underway = {key for tag in running for key in desk.ledger.keys_in(tag)}
        pending = [line for key, line in lines.items() if key not in underway]
        spent: SpentError | None = None
        is_full = False
        while pending or running:
            while pending and spent is None and not is_full:
                tag, chunk, spent = self._reserved(pending, desk)
                if chunk:
                    running[tag] = await self._submit(tag, chunk, desk)
                    pending = pending[len(chunk) :]
            if not running:
                break
            tag, batch = await self._next_over(running, desk)
            del running[tag]
            is_full = self._is_queue_full(batch) and bool(running)
            if batch.status == "failed" and not is_full:
                self._shrink(tag, batch, desk)
            pending += await self._collect(tag, batch, lines, desk)
            if spent is not None and spent.may_fit_later:
                spent = None
        if spent is not None:
            raise spent

    async def _reopened(self, desk: Desk) -> dict[str, str]:
        """Returns the batches that former runs left open: tag -> the server's name."""
        running: dict[str, str] = {}
        for tag, known in desk.ledger.open_batches():
            found = known or await self._find(tag)
            if found is None:
                desk.ledger.close_batch(tag)
                continue
            desk.ledger.name_batch(tag, found)
            running[tag] = found
            desk.say(f"batch {found}: taken up again, {len(desk.ledger.keys_in(tag)):,} requests")
        return running

    def _reserved(self, pending: Sequence[_Line], desk: Desk) -> tuple[str, list[_Line], SpentError | None]:
        """Notes as many of the next requests as one batch and the caps allow; returns them with the batch's tag."""
        tag, size = uuid.uuid4().hex, 0
        chunk: list[_Line] = []
        with desk.ledger.together():
            for line in pending[: self._largest]:
                size += len(self._body(line))
                if chunk and size > self._config.batch.max_bytes:
                    break
                try:
                    desk.sending(line.request, batch=tag)
                except SpentError as error:
                    return tag, chunk, error
                chunk.append(line)
        return tag, chunk, None

    async def _submit(self, tag: str, chunk: Sequence[_Line], desk: Desk) -> str:
        for line in chunk:
            line.sent = self._dialect.options(line.request, line.format)
        content = b"".join(self._body(line) for line in chunk)
        file = await self._patiently(lambda: self._client.upload(content))
        is_first = True

        async def create() -> str:
            nonlocal is_first
            # An earlier try may have got through although its answer did not.
            found = None if is_first else await self._find_once(tag)
            is_first = False
            return found or await self._client.create_batch(file, tag_key=TAG_KEY, tag=tag)

        name = await self._patiently(create)
        desk.ledger.name_batch(tag, name)
        desk.say(f"batch {name}: {len(chunk):,} requests; stop at will, the same command waits for it again")
        return name

    def _body(self, line: _Line) -> bytes:
        request = line.request
        body = {
            "model": request.model,
            "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}],
            **line.sent,
        }
        entry = {"custom_id": request.key(), "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"

    async def _find_once(self, tag: str) -> str | None:
        return await self._client.batch_of_tag(TAG_KEY, tag, among=NEWEST)

    async def _find(self, tag: str) -> str | None:
        return await self._patiently(lambda: self._find_once(tag))

    async def _next_over(self, running: Mapping[str, str], desk: Desk) -> tuple[str, BatchState]:
        """Waits until one of the batches is over."""
        seen: dict[str, str] = {}
        while True:
            for tag, name in running.items():
                batch = await self._state(name)
                says = f"batch {name}: {batch.status}, {batch.done:,} of {batch.total:,} done"
                if seen.get(tag) != says:
                    seen[tag] = says
                    desk.say(says)
                if batch.status in OVER:
                    return tag, batch
            await asyncio.sleep(self._config.batch.poll_seconds)

    async def _state(self, name: str) -> BatchState:
        return await self._patiently(lambda: self._client.batch(name))

    def _is_queue_full(self, batch: BatchState) -> bool:
        """Returns whether a batch was refused for the tokens that the account has waiting already."""
        return batch.status == "failed" and "token_limit_exceeded" in batch.errors

    def _shrink(self, tag: str, batch: BatchState, desk: Desk) -> None:
        """Halves the batches after one was too large by itself; any other refusal ends the run."""
        size = len(desk.ledger.keys_in(tag))
        if not self._is_queue_full(batch) or size <= 1:
            desk.ledger.close_batch(tag)
            raise LabelerError(
                f"{self._client.where}: batch {batch.name} was refused: {batch.errors or 'no reason given'}"
            )
        self._largest = min(self._largest, size) // 2

    async def _collect(self, tag: str, batch: BatchState, lines: Mapping[str, _Line], desk: Desk) -> list[_Line]:
        """Reports what a finished batch answered; returns what has to be asked again."""
        entries: list[Mapping[str, JsonValue]] = []
        for file in batch.files:
            entries += _json_lines(await self._content(file))
        left = desk.ledger.keys_in(tag)
        again: list[_Line] = []
        for entry in entries:
            key = str(entry.get("custom_id"))
            # Others are said twice, or nothing that was asked.
            if key in left:
                left.discard(key)
                again += self._taken(key, entry, lines.get(key), desk)
        for key in sorted(left & lines.keys()):
            is_fault = batch.status != "failed"
            again += self._once_more(lines[key], f"batch {batch.status} without it", desk, is_fault=is_fault)
        desk.ledger.close_batch(tag)
        if self._end is not None:
            raise self._end
        return again

    async def _content(self, file: str) -> bytes:
        return await self._patiently(lambda: self._client.content(file))

    def _taken(self, key: str, entry: Mapping[str, JsonValue], line: _Line | None, desk: Desk) -> list[_Line]:
        """Reports one result; returns the line if it has to be asked again."""
        asked = None if line is None else line.request
        reply, complaint = _read(entry, asked)
        if line is None:
            # Of a former run that asked for more: paid, so kept.
            if reply is not None:
                desk.ledger.record(key, reply)
            return []
        if reply is not None:
            for notice in (self._dialect.accepted(line.format), self._dialect.missing_logprobs(line.request, reply)):
                if notice:
                    desk.say(f"{self._client.where}: {notice}")
            desk.answered(line.request, reply)
            return []
        adapted = self._dialect.adapted(complaint, line.format, sent=line.sent)
        if adapted is not None:
            line.format = adapted
            return self._once_more(line, str(complaint), desk)
        if complaint.verdict == "stop":
            # Not before the other lines are read, as they are paid for.
            self._end = self._client.stopped(complaint)
            return []
        if complaint.verdict == "never":
            desk.unanswered(line.request, (0, 0))
            desk.failed(line.request, f"{self._client.where}: {complaint}")
            return []
        return self._once_more(line, str(complaint), desk)

    def _once_more(self, line: _Line, reason: str, desk: Desk, *, is_fault: bool = True) -> list[_Line]:
        desk.unanswered(line.request, (0, 0))
        line.tries += is_fault
        if line.tries <= self._config.max_retries:
            return [line]
        desk.failed(line.request, f"{self._client.where}: {reason}, {line.tries} times")
        return []

    async def _patiently(self, call: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Calls until it succeeds or the errors are more than allowed."""
        failures = 0

        def pause(error: Exception) -> bool | float:
            nonlocal failures
            if isinstance(error, RefusedError):
                if error.complaint.verdict not in {"rate", "later"}:
                    return False
                wanted = retry_after(error.complaint.headers)
            elif isinstance(error, LostError | UnreachableError):
                wanted = None
            else:
                return False
            failures += 1
            return failures <= self._config.max_retries and (True if wanted is None else wanted)

        try:
            async for attempt in self._client.tries(pause):
                with attempt:
                    return await call()
        except RefusedError as error:
            raise self._client.stopped(error.complaint) from error
        except (LostError, UnreachableError) as error:
            raise self._client.unreachable(error) from error
        raise AssertionError("tries end with a result or an error")


def _json_lines(data: bytes) -> Iterable[Mapping[str, JsonValue]]:
    """Yields the objects of a file, one a line; a line that is none is passed over, as the request it belongs to is missed."""
    for text in data.splitlines():
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def _read(entry: Mapping[str, JsonValue], asked: ChatRequest | None) -> tuple[ChatReply | None, Complaint]:
    """Returns the answer in a line of results, or the complaint in its place."""
    response, error = entry.get("response"), entry.get("error")
    body = response.get("body") if isinstance(response, dict) else None
    status = whole_number(response.get("status_code")) if isinstance(response, dict) else None
    if status == 200 and isinstance(body, dict):
        most_input, choices = (0, ()) if asked is None else (asked.most_tokens()[0], asked.choices)
        reply = read_completion(body, most_input=most_input, choices=choices)
        if reply is not None:
            return reply, Complaint(status=200, message="")
    inner = body.get("error") if isinstance(body, dict) else error
    inner = inner if isinstance(inner, dict) else {}
    # Without a response there was no answer of the model: the line expired, or was lost on the server.
    code = status if status is not None and status != 200 else 500
    return None, Complaint(
        status=code, message=str(inner.get("message") or "no answer"), code=str(inner.get("code") or "")
    )
