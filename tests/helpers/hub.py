"""A stand-in for the Hugging Face hub: as much of its interface as a push needs, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_verysecrettoken"


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class Hub:
    """What it holds, and how it behaves.

    Attributes:
        failures: (method, a part of the path) -> how many of such requests fail yet, the status, and what it says.
        requests: method and path of each.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    failures: dict[tuple[str, str], tuple[int, int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def count(self, words: str) -> int:
        """How many requests have these words in them."""
        return sum(words in request for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        content = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def handle_request(self) -> None:
        hub = self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        for (method, part), (left, status, message) in hub.failures.items():
            if method == self.command and part in path and left:
                hub.failures[method, part] = (left - 1, status, message)
                return self.answer(status, {"error": message}, X_Error_Message=message)
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?", path)
        repository = hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.of_repository(match[1], repository, match[2] or "", body)

    do_GET = do_POST = do_PUT = handle_request  # noqa: N815 - names that http.server looks for

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.hub.repositories
        if not known:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
        self.answer(409 if known else 200, {"url": f"{self.hub.url}/{name}"})

    def of_repository(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        what, _, branch = rest.partition("/")
        if what == "branch":
            known = branch in repository.branches
            if not known:
                repository.branches[branch] = dict(repository.branches["main"])
            return self.answer(409 if known else 200)
        if what in ("", "revision"):
            files = repository.branches[branch or "main"]
            siblings = [{"rfilename": file} for file in sorted(files)]
            return self.answer(200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": siblings})
        if what == "preupload":
            files = [{"path": file["path"], "shouldIgnore": False} for file in json.loads(body)["files"]]
            files = [{**f, "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]
            return self.answer(200, {"files": files})
        if what == "info":
            return self.batch(json.loads(body)["objects"])
        assert what == "commit", rest
        return self.commit(name, repository.branches[branch], body)

    def batch(self, objects: list[dict[str, Any]]) -> None:
        """Where large files go; nowhere where they are already."""
        answers = []
        for wanted in objects:
            upload = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
            answers.append(wanted if wanted["oid"] in self.hub.large else {**wanted, "actions": upload})
        self.answer(200, {"objects": answers, "transfer": "basic"})

    def commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on a port of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
