"""A local server that answers huggingface_hub's client as the hub does: files, listings, errors, and uploads."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.saekit.hub.hub_repo import LFS_SUFFIXES, HubRepo, git_oid, tree_entry

TOKEN = "hf_of_the_tests"
"""What the server takes for a login."""


@dataclass
class Fault:
    """What goes wrong with requests whose method and path match."""

    pattern: str
    times: int
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = 0
    """Bytes of the body that are sent before the connection is cut, where there is no status."""


@dataclass(frozen=True)
class Request:
    """One request that the server got."""

    method: str
    path: str
    range: str | None
    has_token: bool

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class HubServer:
    """Repositories in memory behind a port; `localhost` plays the storage that files are redirected to."""

    def __init__(self) -> None:
        """Starts to serve."""
        self.repos: dict[str, HubRepo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.page_size = 1000
        self.has_ranges = True
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        """The hub."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def storage_url(self) -> str:
        """Another host, where large files lie."""
        return f"http://localhost:{self._server.server_port}"

    def add(self, repo: str, files: Mapping[str, bytes] | Path, **facts: Any) -> HubRepo:
        """Makes a repository of files, or of a folder's."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        self.repos[repo] = HubRepo(**facts)
        self.repos[repo].commit(files)
        return self.repos[repo]

    def fail(self, pattern: str, status: int, *, times: int = 1, **headers: str) -> None:
        """Answers the next requests that match with an error."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, times, status=status, headers=named))

    def cut(self, pattern: str, *, after: int, times: int = 1) -> None:
        """Ends the connection of the next requests that match in the middle of the body."""
        self.faults.append(Fault(pattern, times, after=after))

    def asked(self, pattern: str = "") -> list[str]:
        """Returns the requests so far that match, as `METHOD path`."""
        return [str(request) for request in self.requests if re.search(pattern, str(request))]

    def fault(self, request: Request) -> Fault | None:
        """Returns what goes wrong with a request, once less from then on."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, str(request)):
                fault.times -= 1
                return fault
        return None

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    _cut_after: int | None = None

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *_: object) -> None: ...

    def _serve(self) -> None:
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        request = Request(self.command, unquote(self.path), self.headers.get("Range"), has_token)
        self.hub.requests.append(request)
        self._has_token = has_token
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self._body = self._chunks()
        fault = self.hub.fault(request)
        if fault is not None and fault.status is not None:
            return self._answer(fault.status, headers=fault.headers)
        self._cut_after = None if fault is None else fault.after
        self._route(urlsplit(self.path))
        return None

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def _route(self, url: Any) -> None:
        path, query = unquote(url.path), parse_qs(url.query)
        name = r"([\w.-]+/[\w.-]+)"
        routes = (
            (rf"/api/datasets/{name}", lambda r: self._info(f"datasets/{r}", "main", query)),
            (rf"/api/models/{name}(?:/revision/(.+))?", lambda r, v: self._info(r, v or "main", query)),
            (rf"/api/models/{name}/tree/([^/]+)(?:/(.+))?", lambda r, v, p: self._tree(r, v, p or "", query)),
            (rf"/api/models/{name}/refs", self._refs),
            (rf"/api/models/{name}/preupload/(.+)", self._preupload),
            (rf"/api/models/{name}/commit/(.+)", self._commit),
            (rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            (rf"/{name}/resolve/([^/]+)/(.+)", self._resolve),
            (rf"/api/resolve-cache/models/{name}/([^/]+)/(.+)", self._regular),
            (r"/storage/(\w+)", self._storage),
            (r"/storage/(\w+)/verify", lambda oid: self._answer(200 if oid in self.hub.blobs else 404)),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
        )
        for pattern, serve in routes:
            found = re.fullmatch(pattern, path)
            if found:
                serve(*found.groups())
                return
        self._answer(404)

    def _repo(self, name: str, revision: str | None = None) -> tuple[HubRepo, str] | None:
        """Returns a repository and the commit; answers as the hub does where either is missing."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.is_private and not self._has_token):
            self._answer(404 if self._has_token else 401, headers={"X-Error-Code": "RepoNotFound"})
            return None
        commit = repo.resolve(revision or "main")
        if commit is None:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, commit

    def _info(self, name: str, revision: str, query: dict[str, list[str]]) -> None:
        found = self._repo(name, revision)
        if found is None:
            return
        repo, commit = found
        facts = {
            "id": name,
            "sha": commit,
            "gated": "auto" if repo.is_gated else False,
            "private": repo.is_private,
            "cardData": repo.card,
            "tags": [f"license:{repo.card['license']}"] if "license" in repo.card else [],
            "siblings": [{"rfilename": file} for file in sorted(repo.commits[commit])],
        }
        wanted = query.get("expand")
        self._json({key: value for key, value in facts.items() if wanted is None or key in {"id", *wanted}})

    def _tree(self, name: str, revision: str, folder: str, query: dict[str, list[str]]) -> None:
        found = self._repo(name, revision)
        if found is None:
            return None
        files = found[0].commits[found[1]]
        prefix = f"{folder}/" if folder else ""
        under = sorted(file for file in files if file.startswith(prefix))
        if not under:
            return self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        entries: dict[str, dict[str, Any]] = {}
        for file in under:
            parts = file.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                path = prefix + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "oid": git_oid(path.encode()), "size": 0, "path": path}
            entries[file] = tree_entry(file, files[file])
        if query.get("recursive", ["false"])[0].lower() != "true":
            entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)}
        start = int(query.get("cursor", ["0"])[0])
        page = [entries[path] for path in sorted(entries)[start : start + self.hub.page_size]]
        headers = {}
        if start + self.hub.page_size < len(entries):
            recursive = query.get("recursive", ["false"])[0]
            here = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}"
            headers["Link"] = f'<{here}&cursor={start + self.hub.page_size}>; rel="next"'
        self._json(page, headers=headers)
        return None

    def _refs(self, name: str) -> None:
        found = self._repo(name)
        if found is None:
            return
        branches, tags = (
            [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in refs.items()]
            for kind, refs in (("heads", found[0].refs), ("tags", found[0].tags))
        )
        self._json({"branches": branches, "tags": tags, "converts": []})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        found = self._repo(name, revision)
        if found is None:
            return None
        repo, commit = found
        if repo.is_gated and not self._has_token:
            return self._answer(401, headers={"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit})
        content = repo.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return self._answer(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        if not file.endswith(LFS_SUFFIXES):
            return self._answer(
                307, headers={**headers, "Location": f"/api/resolve-cache/models/{name}/{commit}/{file}"}
            )
        oid = hashlib.sha256(content).hexdigest()
        self.hub.blobs[oid] = content
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"'}
        return self._answer(302, headers={**headers, "Location": f"{self.hub.storage_url}/storage/{oid}?signed=1"})

    def _regular(self, name: str, commit: str, file: str) -> None:
        content = self.hub.repos[name].commits[commit][file]
        self._content(content, headers={"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": commit})

    def _storage(self, oid: str) -> None:
        if self.command == "PUT":
            self.hub.blobs[oid] = self._body
            return self._answer(200, headers={"ETag": f'"{oid}"'})
        if oid not in self.hub.blobs:
            return self._answer(404)
        return self._content(self.hub.blobs[oid], headers={"ETag": f'"{oid}"'})

    def _content(self, content: bytes, *, headers: Mapping[str, str]) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None or not self.hub.has_ranges:
            return self._answer(200, content, {**headers, "Accept-Ranges": "bytes"})
        first, last = int(span.group(1)), min(int(span.group(2) or len(content)), len(content) - 1)
        if first >= len(content):
            return self._answer(416, headers={"Content-Range": f"bytes */{len(content)}"})
        part = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self._answer(206, content[first : last + 1], part)

    def _create(self) -> None:
        if not self._has_token:
            return self._answer(401)
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": name}, status=409)
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, is_private=is_private)
        return self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def _preupload(self, name: str, revision: str) -> None:
        found = self._writable(name, revision)
        if found is None:
            return
        held = found[0].commits[found[1]]
        files = []
        for asked in json.loads(self._body)["files"]:
            path = asked["path"]
            is_large = path.endswith(LFS_SUFFIXES)
            oid = tree_entry(path, held[path])["oid"] if path in held and not is_large else None
            mode = "lfs" if is_large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, name: str) -> None:
        if self._writable(name, "main") is None:
            return
        objects = []
        for asked in json.loads(self._body)["objects"]:
            href = f"{self.hub.storage_url}/storage/{asked['oid']}"
            actions = {
                "upload": {"href": f"{href}?signed=1"},
                "verify": {"href": f"{self.hub.url}/storage/{asked['oid']}/verify"},
            }
            objects.append({**asked, **({} if asked["oid"] in self.hub.blobs else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, revision: str) -> None:
        found = self._writable(name, revision)
        if found is None:
            return
        files = {}
        for line in self._body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = found[0].commit(files, ref=revision)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _writable(self, name: str, revision: str) -> tuple[HubRepo, str] | None:
        if not self._has_token:
            self._answer(401)
            return None
        return self._repo(name, revision)

    def _json(self, value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            is_content = status in {200, 206} and self._cut_after is not None
            self.wfile.write(body[: self._cut_after] if is_content else body)
