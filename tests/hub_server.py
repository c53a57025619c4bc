"""A Hugging Face hub on this machine, as far as its client needs one: repos are made, files committed, found and fetched.

What it answers is what the client of huggingface_hub 2.4 asks for; large files go the way of small ones, in the commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """endpoint: its URL. repos: the files of each repo's newest commit. private: the repos that were made private.
    meanwhile: called once after it has sent the file of that name, as if somebody pushed just then."""

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    meanwhile: dict[str, Callable[[], None]] = field(default_factory=dict)
    _commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)

    def commit_of(self, repo: str) -> str:
        digest = hashlib.sha1()
        for name, data in sorted(self.repos[repo].items()):
            digest.update(name.encode() + data)
        self._commits[repo, digest.hexdigest()] = dict(self.repos[repo])
        return digest.hexdigest()

    def files_of(self, repo: str, commit: str) -> dict[str, bytes] | None:
        return self._commits.get((repo, commit))


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        self._file(with_body=True)

    def _file(self, with_body: bool) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if found is None or found[1] not in self.hub.repos:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repo, revision, name = found.groups()
        newest = self.hub.commit_of(repo)
        commit = newest if revision == "main" else revision
        files = self.hub.files_of(repo, commit)
        if files is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        known = {"X-Repo-Commit": commit}
        if name not in files:
            return self._answer(404, {"error": "Entry not found"}, known | {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(files[name]).hexdigest()
        self._send(200, files[name], known | {"ETag": f'"{etag}"'}, with_body)
        if with_body and name in self.hub.meanwhile:
            self.hub.meanwhile.pop(name)()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        path = self.path.partition("?")[0]
        committed = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(part for part in (asked.get("organization") or "me", asked["name"]))
            self.hub.repos.setdefault(repo, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repo)
            self._answer(200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})
        elif committed is not None and committed[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer(200, {"files": modes})
        elif committed is not None:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.repos[committed[1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = self.hub.commit_of(committed[1])
            url = f"{self.hub.endpoint}/{committed[1]}/commit/{commit}"
            self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
        else:
            self._answer(404, {"error": f"no {path} here"})

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, tree: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        told = {"Content-Type": "application/json"} | (headers or {})
        self._send(status, json.dumps(tree).encode(), told, self.command != "HEAD")

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)
