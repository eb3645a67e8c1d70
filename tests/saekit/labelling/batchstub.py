"""The stub server with files and batches: results out of order, twice, partial, expired, refused or late."""

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.saekit.labelling.stub import Fault, Responder, StubServer, completion, send


@dataclass
class StubBatch:
    """One batch as the server has it."""

    name: str
    tag: dict[str, str]
    lines: list[dict[str, object]]
    polls_left: int
    status: str = "in_progress"
    errors: list[dict[str, object]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


class BatchServer(StubServer):
    """Answers each batch at its `polls`-th look.

    Attributes:
        spoil: (batch number, lines of results) -> status of the batch and the lines as they are given out.
        refuse: batch -> its error, None where it is taken.
        faults: (method, path) of the next calls -> a fault; used up one by one.
        drop_created: how many batches are created although the client is told that it failed.
    """

    def __init__(self, respond: Responder) -> None:
        super().__init__(respond)
        self.batches: list[StubBatch] = []
        self.files: dict[str, bytes] = {}
        self.polls = 1
        self.spoil: Callable[[int, list[dict[str, object]]], tuple[str, list[dict[str, object]]]] = shuffled
        self.refuse: Callable[[StubBatch], dict[str, object] | None] = lambda _: None
        self.faults: list[tuple[str, Fault]] = []
        self.drop_created = 0

    def post(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        if self._faulty(handler):
            return
        if handler.path.endswith("/files"):
            name = f"file-{len(self.files)}"
            self.files[name] = _uploaded(data)
            send(
                handler,
                _json(
                    {
                        "id": name,
                        "object": "file",
                        "bytes": len(data),
                        "created_at": 0,
                        "filename": "x",
                        "purpose": "batch",
                    }
                ),
            )
        elif handler.path.endswith("/batches"):
            self._create(handler, json.loads(data))
        else:
            super().post(handler, data)

    def _create(self, handler: BaseHTTPRequestHandler, asked: dict[str, object]) -> None:
        lines = [json.loads(line) for line in self.files[str(asked["input_file_id"])].splitlines()]
        batch = StubBatch(f"batch_{len(self.batches)}", asked.get("metadata") or {}, lines, self.polls)  # type: ignore[arg-type]
        self.batches.append(batch)
        if (refused := self.refuse(batch)) is not None:
            batch.status, batch.errors = "failed", [refused]
        if self.drop_created:
            self.drop_created -= 1
            send(handler, Fault(502, body="<html>", headers={"Content-Type": "text/html"}))
        else:
            send(handler, _json(_shown(batch)))

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if self._faulty(handler):
            return
        path = handler.path.partition("?")[0]
        if match := re.search(r"/files/(.*)/content$", path):
            send(handler, Fault(body=self._result(match[1]).decode()))
        elif match := re.search(r"/batches/(.*)$", path):
            batch = next(batch for batch in self.batches if batch.name == match[1])
            self._advance(batch)
            send(handler, _json(_shown(batch)))
        else:
            data = [_shown(batch) for batch in reversed(self.batches)]
            send(handler, _json({"object": "list", "data": data, "has_more": False}))

    def _advance(self, batch: StubBatch) -> None:
        if batch.status != "in_progress":
            return
        if batch.polls_left > 1:
            batch.polls_left -= 1
            return
        with self.lock:
            first = len(self.requests)
            self.requests += [line["body"] for line in batch.lines]  # type: ignore[misc]
        results = [self._answered(line, first + n) for n, line in enumerate(batch.lines)]
        batch.status, given = self.spoil(self.batches.index(batch), results)
        good = [line for line in given if line["error"] is None and line["response"]["status_code"] == 200]  # type: ignore[index]
        bad = [line for line in given if line not in good]
        for kind, lines in (("output", good), ("error", bad)):
            if lines:
                batch.files[kind] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        asked = {line["custom_id"] for line in batch.lines}
        for line in {line["custom_id"]: line for line in good if line["custom_id"] in asked}.values():
            usage = line["response"]["body"]["usage"]  # type: ignore[index]
            self.charged.append((usage["prompt_tokens"], usage["completion_tokens"]))

    def _answered(self, line: dict[str, object], number: int) -> dict[str, object]:
        answer = self.respond(line["body"], number)  # type: ignore[arg-type]
        status, body = 200, None
        if isinstance(answer, Fault):
            status, body = answer.status, {"error": {"message": f"fault {answer.status}", **answer.error}}
        else:
            body = completion(answer)
        response = {"status_code": status, "request_id": str(number), "body": body}
        return {"id": str(number), "custom_id": line["custom_id"], "response": response, "error": None}

    def _result(self, name: str) -> bytes:
        number, _, kind = name.removeprefix("result-").partition("-")
        return self.batches[int(number)].files[kind]

    def _faulty(self, handler: BaseHTTPRequestHandler) -> bool:
        for index, (call, fault) in enumerate(self.faults):
            if re.fullmatch(call, f"{handler.command} {handler.path.partition('?')[0].removeprefix('/v1')}"):
                del self.faults[index]
                send(handler, fault)
                return True
        return False


def shuffled(number: int, lines: list[dict[str, object]]) -> tuple[str, list[dict[str, object]]]:
    """Out of order, as the API promises no order."""
    random.Random(number).shuffle(lines)
    return "completed", lines


def _json(value: object) -> Fault:
    return Fault(body=json.dumps(value))


def _uploaded(data: bytes) -> bytes:
    """The file in a multipart form."""
    boundary = data.partition(b"\r\n")[0]
    part = next(part for part in data.split(boundary) if b'name="file"' in part)
    return part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")


def _shown(batch: StubBatch) -> dict[str, object]:
    number = int(batch.name.removeprefix("batch_"))
    is_over = batch.status != "in_progress"
    return {
        "id": batch.name,
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file",
        "completion_window": "24h",
        "status": batch.status,
        "created_at": 0,
        "metadata": batch.tag,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "output_file_id": f"result-{number}-output" if "output" in batch.files else None,
        "error_file_id": f"result-{number}-error" if "error" in batch.files else None,
        "request_counts": {"total": len(batch.lines), "completed": len(batch.lines) if is_over else 0, "failed": 0},
    }


@contextmanager
def batch_serving(respond: Responder) -> Iterator[BatchServer]:
    server = BatchServer(respond)
    server.start()
    try:
        yield server
    finally:
        server.stop()
