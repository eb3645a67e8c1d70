"""An OpenAI-compatible server on 127.0.0.1 that answers from the prompt, misbehaves on demand, and keeps its own books."""

import contextlib
import json
import socket
import struct
import threading
import time
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
    drip_seconds: float = 0.0
    """Pause after every byte of the body."""
    reset_after: int | None = None
    """Bytes of the body after which the connection is reset."""
    hang_seconds: float = 0.0
    """Pause before anything is sent."""


Responder = Callable[[dict[str, object], int], "str | dict[str, object] | Fault"]
"""(request body, number of the request) -> text of the answer, a whole completion, or a fault."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, *_: object) -> None:
        """A client that went away is none of the server's business."""


class StubServer:
    """Keeps every request it got, and what it charged.

    Attributes:
        requests: bodies of the chat completions asked for.
        charged: (input, output) tokens of every completion that was sent to its end.
        most_at_once: most requests that were in the server together.
    """

    def __init__(self, respond: Responder) -> None:
        self.requests: list[dict[str, object]] = []
        self.charged: list[tuple[int, int]] = []
        self.respond = respond
        self.lock = threading.Lock()
        self.most_at_once = self._inside = 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with stub._counted():
                    stub.post(self, self.rfile.read(int(self.headers["Content-Length"])))

            def do_GET(self) -> None:
                stub.get(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def post(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        """Answers a chat completion."""
        body = json.loads(data)
        with self.lock:
            self.requests.append(body)
            number = len(self.requests) - 1
        answer = self.respond(body, number)
        if isinstance(answer, Fault):
            send(handler, answer)
            return
        whole = completion(answer)
        send(handler, Fault(body=json.dumps(whole)))
        usage = whole.get("usage")
        if isinstance(usage, dict):
            with self.lock:
                self.charged.append((usage["prompt_tokens"], usage["completion_tokens"]))

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        """Has nothing to be got."""
        send(handler, Fault(404))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self.lock:
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
        try:
            yield
        finally:
            with self.lock:
                self._inside -= 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def users(self) -> list[str]:
        """The user messages of all requests, in order."""
        return [str(request["messages"][1]["content"]) for request in self.requests]  # type: ignore[index]


def send(handler: BaseHTTPRequestHandler, fault: Fault) -> None:
    """Sends an answer, with everything that is to be wrong about it."""
    text = fault.body
    if text is None:
        text = json.dumps({"error": {"message": f"fault {fault.status}", **fault.error}})
    data = text.encode()
    time.sleep(fault.hang_seconds)
    # A client that has given up by now has closed the connection.
    with contextlib.suppress(OSError):
        handler.send_response(fault.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **fault.headers}
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if fault.reset_after is not None:
            handler.wfile.write(data[: fault.reset_after])
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
        elif fault.drip_seconds:
            for byte in data:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(fault.drip_seconds)
        else:
            handler.wfile.write(data)


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
