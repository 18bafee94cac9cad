"""A stand-in for the Hugging Face hub: an HTTP server of this process that speaks what its client asks for."""

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
from urllib.parse import unquote, urlparse

TOKEN = "hf_of_the_owner"  # noqa: S105 - opens nothing
LFS = ".safetensors", ".npz"


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})

    def number(self, revision: str) -> int | None:
        """Return the number of the commit that a branch or a (shortened) commit stands for."""
        if revision in self.branches:
            return self.branches[revision]
        return next((n for n in range(len(self.commits)) if sha(n).startswith(revision)), None)


def sha(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:40]


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refuse_commits: bool = False
    damaged: bool = False

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main", *, private: bool = True) -> str:
        repository = self.repositories.setdefault(name, Repository(private))
        repository.commits.append({**repository.commits[repository.branches[branch]], **files})
        repository.branches[branch] = len(repository.commits) - 1
        return sha(len(repository.commits) - 1)


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def _answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, what: str) -> None:
        self._answer({"error": f"{what} not found"}, 404, X_Error_Code=f"{what}NotFound", X_Error_Message=f"no {what}")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _may_read(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._logged_in()):
            return None
        return repository

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            self._describe(match[1], match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._answer({"error": f"unknown {path}"}, 404)

    do_HEAD = do_GET

    def _find(self, name: str, revision: str) -> tuple[Repository, int] | None:
        """Return a repository and the number of a commit; what is missing is answered."""
        repository = self._may_read(name)
        number = None if repository is None else repository.number(revision)
        if repository is None or number is None:
            self._missing("Repo" if repository is None else "Revision")
            return None
        return repository, number

    def _describe(self, name: str, revision: str) -> None:
        if (place := self._find(name, revision)) is None:
            return
        repository, number = place
        siblings: list[dict[str, Any]] = []
        for path, content in repository.commits[number].items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": "0"}
            if path.endswith(LFS):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        self._answer({"id": name, "sha": sha(number), "private": repository.private, "siblings": siblings})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (place := self._find(name, revision)) is None:
            return
        repository, number = place
        content = repository.commits[number].get(path)
        if content is None:
            self._missing("Entry")
            return
        digest = hashlib.sha256(content).hexdigest()
        if self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(content, ETag=f'"{digest}"', X_Repo_Commit=sha(number), Accept_Ranges="bytes")

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"POST {path}")
        body = self._body()
        if not self._logged_in() and path != "/api/validate-yaml":
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self.hub.repositories[match[1]]
            repository.branches.setdefault(match[2], repository.branches["main"])
            self._answer({})
        elif match := re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                }
                for item in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(match[1], match[2], body)
        else:
            self._answer({"error": f"unknown {path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self._answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self._answer({"url": f"{self.hub.url}/{name}"})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        if self.hub.refuse_commits:
            self._answer({"error": "you have no right to write here"}, 403)
            return
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = self.hub.commit(name, files, branch)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.blobs[self.path.rpartition("/")[2]] = content
        self._answer({})
