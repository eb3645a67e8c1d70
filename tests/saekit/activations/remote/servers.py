"""Servers that tests start on this machine: S3 (moto), a proxy before it that fails on purpose, plain files with and without Range."""

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from saekit.activations.objects import Objects

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

SECRET = "wJalrXUtnFEMI-do-not-print"

SECRET = "wJalrXUtnFEMI-do-not-print"
"""Must not be seen anywhere."""

Fault = Callable[[str, str, int], str | None]
"""Method, path and how often the same was asked for before -> `503`, `403`, `drop`, or None for the answer itself."""


class Proxy:
    """Passes requests on to a server, or does what `fault` says.

    Attributes:
        url: where it listens.
        fault: what goes wrong; may be changed at any time.
        asked: requests so far: method, path without the query, Range.
        signatures: their headers of that kind.
    """

    def __init__(self, port: int, behind: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.behind = behind
        self.fault: Fault = no_fault
        self.asked: list[tuple[str, str, str | None]] = []
        self.signatures: list[str] = []
        self._lock = threading.Lock()

    def count(self, method: str, path: str, ranged: str | None) -> int:
        with self._lock:
            before = self.asked.count((method, path, ranged))
            self.asked.append((method, path, ranged))
        return before


def no_fault(method: str, path: str, before: int) -> str | None:
    return None


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """Yields a server with this handler, in threads of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def proxy(behind: int) -> Iterator[Proxy]:
    """Yields a proxy before the server at that port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            state.signatures.append(self.headers.get("Authorization") or "")
            before = state.count(self.command, path, self.headers.get("Range"))
            fault = state.fault(self.command, path, before)
            if fault in {"403", "503"}:
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            link = http.client.HTTPConnection("127.0.0.1", state.behind)
            link.request(self.command, self.path, body, dict(self.headers))
            answer = link.getresponse()
            content = answer.read()
            link.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "connection", "date", "server"}:
                    self.send_header(name, value)
            self.end_headers()
            if fault == "drop":
                content = content[: len(content) // 2]
                self.close_connection = True
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.handle_any)
    with serving(Handler) as server:
        state = Proxy(server.server_port, behind)
        yield state


@contextlib.contextmanager
def files(folder: Path, *, ranges: bool = True) -> Iterator[str]:
    """Yields the URL of a server of plain files, with or without Range."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]  # as the server gives them

        def do_GET(self) -> None:
            asked, path = self.headers.get("Range"), Path(self.translate_path(self.path))
            if not ranges or asked is None or not path.is_file():
                super().do_GET()
                return
            content = path.read_bytes()
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            self.send_response(206 if part else 416)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def upload(folder: Path, url: str) -> None:
    """Copies a cache to an object store, as its users do with other tools."""
    there = Objects(url)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    there.each(lambda path: there.write(path.relative_to(folder).as_posix(), path.read_bytes()), paths)


def contents(url: str) -> dict[str, bytes]:
    """Returns the bytes of every file there but the manifest, which holds times of day."""
    there = Objects(url)
    keys = [key for key in there.sizes() if key != "manifest.json"]
    return dict(zip(keys, there.each(there.read, keys), strict=True))
