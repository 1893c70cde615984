"""A hub on this machine, which speaks the part of the hub's protocol that a push needs, and keeps what it is sent."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "a1" * 17
LARGE = (".safetensors", ".jsonl")  # sent as large files, like on the hub


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: contents by kind, repository and path.
        private: whether a repository is private, by kind and name.
        refuses: the status with which a path is answered, by the path's beginning.
        requests: method and path of every request, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.private: dict[tuple[str, str], bool] = {}
        self.refuses: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, kind: str, repo: str) -> dict[str, bytes]:
        """The files of a repository by path."""
        return {path: content for (what, name, path), content in self.files.items() if (what, name) == (kind, repo)}


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve in a thread."""
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._admit():
            _, _, kinds, user, name, *_ = self.path.partition("?")[0].split("/")
            key = (kinds.removesuffix("s"), f"{user}/{name}")
            if key not in self.server.private:
                return self._answer(404, {"error": "Repository not found"})
            self._answer(200, {"id": key[1], "private": self.server.private[key], "siblings": [], "tags": []})

    def do_PUT(self) -> None:
        self.server.requests.append(("PUT", self.path))
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if not self._admit():
            return None
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        _, _, kinds, user, name, verb, *_ = path.split("/")
        if verb == "preupload":
            files = json.loads(body)["files"]
            modes = ["lfs" if each["path"].endswith(LARGE) else "regular" for each in files]
            answers = [
                {"path": each["path"], "uploadMode": mode, "shouldIgnore": False}
                for each, mode in zip(files, modes, strict=True)
            ]
            return self._answer(200, {"files": answers})
        assert verb == "commit"
        return self._commit(kinds.removesuffix("s"), f"{user}/{name}", body)

    def _create(self, asked: dict[str, Any]) -> None:
        kind, user = asked.get("type", "model"), asked.get("organization") or "me"
        repo = f"{user}/{asked['name']}"
        prefix = "datasets/" if kind == "dataset" else ""
        answer = {"url": f"{self.server.address}/{prefix}{repo}"}
        if (kind, repo) in self.server.private:
            return self._answer(409, {"error": "You already created this repo", **answer})
        self.server.private[kind, repo] = bool(asked.get("private") or asked.get("visibility") == "private")
        return self._answer(200, answer)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.address}/large/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, kind: str, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[kind, repo, value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                content = self.server.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.server.files[kind, repo, value["path"]] = content
        prefix = "datasets/" if kind == "dataset" else ""
        address = f"{self.server.address}/{prefix}{repo}/commit/{'0' * 40}"
        self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": address, "hookOutput": ""})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _admit(self) -> bool:
        """Record the request, and refuse it without the token or where the test says so."""
        self.server.requests.append((str(self.command), self.path))
        status = next((code for start, code in self.server.refuses.items() if self.path.startswith(start)), 0)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status:
            self._answer(status, {"error": "Invalid credentials" if status == 401 else "Forbidden"})
        return not status

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
