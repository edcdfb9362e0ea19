"""A hub on this machine: an HTTP server that speaks as much of the hub's language as huggingface_hub needs here.

Repositories with commits, read by name, branch and commit; a token; new repositories, large files and commits.
"""

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
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN, READ_TOKEN = "hf_writes", "hf_reads"
LARGE = (".safetensors",)


@dataclass
class Repository:
    """commits: id -> files, oldest first; the last one is main."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[name] = dict(files)
        return name

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]


@dataclass
class Hub:
    """repositories: by OWNER/NAME, data sets by datasets/OWNER/NAME. asked: "METHOD path" of every request. refuses: a
    part of the path of requests that are answered with 403."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refuses: str | None = None

    def add(self, name: str, files: dict[str, bytes] | Path) -> str:
        """A new commit, of these files or those of a folder; its id."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        return self.repositories.setdefault(name, Repository()).commit(files)

    def fetched(self) -> set[str]:
        """Names of the files that were downloaded."""
        found = (re.fullmatch(r"GET .*/resolve/[^/]+/(.+)", line) for line in self.asked)
        return {match[1] for match in found if match}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _lfs(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def log_message(self, *_: object) -> None:
        pass

    def _read(self) -> None:
        if (path := self._begin()) is None:
            return
        if path == "/api/whoami-v2":
            roles = {TOKEN: "write", READ_TOKEN: "read"}
            role = roles.get(self._token())
            self._json({"name": "me", "auth": {"accessToken": {"role": role}}} if role else {}, 200 if role else 401)
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            found = self._commit("datasets/" * (match[1] == "datasets") + match[2], match[3] or "main")
            if found:
                files = [{"rfilename": name} for name in found[1]]
                private = self.hub.repositories[found[2]].private
                self._json({"id": match[2], "sha": found[0], "private": private, "siblings": files})
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", path):
            found = self._commit("datasets/" * (match[1] == "datasets") + match[2], match[3])
            if found:
                self._json([self._entry(name, content) for name, content in found[1].items()])
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self._commit(match[1], match[2])
            if found and match[3] not in found[1]:
                self._refuse("EntryNotFound")
            elif found:
                content = found[1][match[3]]
                etag = _lfs(content) if match[3].endswith(LARGE) else hashlib.sha1(content).hexdigest()
                self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})
        else:
            self._refuse("RepoNotFound")

    def _write(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if (path := self._begin()) is None:
            return
        if match := re.fullmatch(r"/large/([0-9a-f]{64})", path):
            assert _lfs(body) == match[1]
            self.hub.large[match[1]] = body
            self._answer(200, b"")
        elif self._token() != TOKEN:
            self._json({"error": "no right to write"}, 403)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repositories:
                self._json({"error": "it is there", "url": f"{self.hub.url}/{name}"}, 409)
                return
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.hub.repositories[name] = Repository(private)
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{self.hub.url}/{name}"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "lfs" if f.endswith(LARGE) else "regular"} for f in files]
            self._json({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        elif path == "/api/validate-yaml":  # of a card's first lines
            self._json({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}} for one in objects]
            self._json({"objects": [one | action for one, action in zip(objects, actions, strict=True)]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._new_commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse("RepoNotFound")

    def _new_commit(self, name: str, lines: list[dict]) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", repository.head) != repository.head:
                self._json({"error": "the branch moved"}, 412)
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _begin(self) -> str | None:
        """The path; None where the request was answered already."""
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.refuses is not None and self.hub.refuses in path:
            self._json({"error": "refused by the test"}, 403)
            return None
        return path

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes], str] | None:
        """(commit, files, repository); None where the request was answered."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token() is None):
            self._refuse("RepoNotFound")
            return None
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            self._refuse("RevisionNotFound")
            return None
        return commit, repository.commits[commit], name

    def _entry(self, name: str, content: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": _lfs(content), "size": len(content), "pointerSize": 134}
        return entry

    def _refuse(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code})

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
