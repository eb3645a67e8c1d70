"""An OpenAI-compatible server on 127.0.0.1 that answers from the prompt and misbehaves on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """One answer that is no good answer."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    """Sent as it is; None: an OpenAI error of that status."""
    error: dict[str, object] = field(default_factory=dict)


Responder = Callable[[dict[str, object], int], "str | dict[str, object] | Fault"]
"""(request body, number of the request) -> text of the answer, a whole completion, or a fault."""


class StubServer:
    """Keeps every request it got."""

    def __init__(self, respond: Responder) -> None:
        self.requests: list[dict[str, object]] = []
        self.respond = respond
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.requests.append(body)
                    number = len(stub.requests) - 1
                answer = stub.respond(body, number)
                self._send(answer if isinstance(answer, Fault) else Fault(body=json.dumps(completion(answer))))

            def _send(self, fault: Fault) -> None:
                text = fault.body
                if text is None:
                    text = json.dumps({"error": {"message": f"fault {fault.status}", **fault.error}})
                data = text.encode()
                self.send_response(fault.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **fault.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def users(self) -> list[str]:
        """The user messages of all requests, in order."""
        return [str(request["messages"][1]["content"]) for request in self.requests]  # type: ignore[index]


def completion(answer: str | dict[str, object]) -> dict[str, object]:
    """A whole completion around a text."""
    if isinstance(answer, dict):
        return answer
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


@contextmanager
def serving(respond: Responder) -> Iterator[StubServer]:
    server = StubServer(respond)
    server.start()
    try:
        yield server
    finally:
        server.stop()
