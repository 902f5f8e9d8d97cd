"""A Hub of one's own on this machine: what the Hub's client asks for when it creates, uploads, commits, lists and downloads.

Repositories are kept as commits of path -> bytes. Files over `LFS_FROM` bytes and all safetensors are LFS. It announces no xet.
`break_next(method, path, ...)` makes the next matching requests fail; `requests` is what was asked, with its headers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_FROM = 1 << 20


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > LFS_FROM


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        oid = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class FakeHub:
    """`tokens`: token -> account, which may write its own repositories; a token that ends in "-read" may only read."""

    tokens: dict[str, str] = field(default_factory=lambda: {"hf_ownerownerowner": "owner", "hf_readreadread-read": "owner"})
    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)  # id -> commit
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    breaks: list[dict] = field(default_factory=list)
    endpoint: str = ""

    def add(self, name: str, files: dict[str, bytes], **options) -> str:
        """A model that is there; returns its commit."""
        repository = self.models.setdefault(name, Repository(**options))
        return repository.commit(files)

    def break_next(self, method: str, path: str, status: int = 500, *, times: int = 10**6, keep: int | None = None, code: str = "") -> None:
        """`keep`: send only so many bytes of the answer, and hang up."""
        rule = {"method": method, "path": re.compile(path), "status": status, "times": times, "keep": keep, "code": code}
        self.breaks.insert(0, rule)

    def asked(self, method: str, path: str) -> int:
        return sum(each == method and re.search(path, where) is not None for each, where, _ in self.requests)

    @contextmanager
    def serving(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _run(self, method: str) -> None:
        # The body is read whatever becomes of it: the client sends it before it listens.
        self.body = self._read_body()
        self.path_only = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, self.path_only, dict(self.headers)))
        self.rule = next((r for r in self.hub.breaks if r["method"] == method and r["path"].search(self.path_only) and r["times"]), None)
        if self.rule:
            self.rule["times"] -= 1
            if self.rule["keep"] is None:
                return self._answer(self.rule["status"], {"error": "injected"}, {"X-Error-Code": self.rule["code"]})
        for pattern, kind, what in _ROUTES:
            found = re.fullmatch(pattern, self.path_only)
            if found and kind == method:
                return what(self, *found.groups())
        self._answer(404, {"error": f"{method} {self.path_only}: not an endpoint of this Hub"})

    def do_GET(self):
        self._run("GET")

    def do_HEAD(self):
        self._run("HEAD")

    def do_POST(self):
        self._run("POST")

    def do_PUT(self):
        self._run("PUT")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, value: object = None, headers: dict[str, str] | None = None, content: bytes | None = None) -> None:
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, said in {"Content-Type": "application/json", **(headers or {})}.items():
            if said:
                self.send_header(name, said)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            keep = self.rule["keep"] if self.rule else None
            self.wfile.write(content[:keep])
            self.close_connection |= keep is not None

    # Who asks, and what of

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may_write(self, name: str) -> bool:
        return self.hub.tokens.get(self._token) == name.split("/")[0] and not self._token.endswith("-read")

    def _repository(self, name: str) -> Repository | None:
        """None: it was answered that there is none to see."""
        if self._token and self._token not in self.hub.tokens:
            self._answer(401, {"error": "bad token"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        found = self.hub.models.get(name)
        account = self.hub.tokens.get(self._token)
        if found is None or (found.private and account != name.split("/")[0]):
            # As the Hub: who is not logged in learns no more than that.
            self._answer(404 if account else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if found.gated and account != name.split("/")[0]:
            self._answer(403 if account else 401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return None
        return found

    def _at(self, name: str, revision: str):
        repository = self._repository(name)
        if repository is None:
            return None
        if (found := repository.at(revision)) is None:
            self._answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        return found

    def _writable(self, name: str) -> Repository | None:
        repository = self._repository(name)
        if repository is not None and not self._may_write(name):
            self._answer(403, {"error": "forbidden"}, {"X-Error-Message": "you may not write here"})
            return None
        return repository

    # Endpoints

    def info(self, name: str, revision: str | None = None):
        if found := self._at(name, revision or "main"):
            oid, files = found
            siblings = [{"rfilename": path} for path in files]
            self._answer(200, {"id": name, "sha": oid, "private": self.hub.models[name].private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str):
        if found := self._at(name, revision):
            entries = []
            for path, content in sorted(found[1].items()):
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                if is_lfs(path, len(content)):
                    entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self._answer(200, entries)

    def resolve(self, name: str, revision: str, path: str):
        if found := self._at(name, revision):
            oid, files = found
            if path not in files:
                return self._answer(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            content = files[path]
            etag = hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else git_hash(content)
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
            first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if first and self.command == "GET":
                start = int(first[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                return self._answer(206, headers=headers | {"Content-Length": str(len(content) - start)}, content=content[start:])
            self._answer(200, headers=headers, content=content)

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.hub.tokens.get(self._token)}/{asked['name']}"
        if self._token not in self.hub.tokens:
            return self._answer(401, {"error": "Invalid username or password."})
        if not self._may_write(name):
            return self._answer(403, {"error": "forbidden"}, {"X-Error-Message": "You don't have the rights to create a model there"})
        if name in self.hub.models:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"})
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=asked.get("visibility") == "private")
        self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def validate(self):
        good = json.loads(self.body)["content"].startswith("---\n")
        self._answer(200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, name: str, revision: str):
        if repository := self._writable(name):
            there = repository.at(revision)
            modes = []
            for file in json.loads(self.body)["files"]:
                mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
                old = (there[1] if there else {}).get(file["path"])
                modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old and git_hash(old)})
            self._answer(200, {"files": modes})

    def batch(self, name: str):
        if self._writable(name):
            objects = []
            for each in json.loads(self.body)["objects"]:
                upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}", "header": {}}}
                objects.append(each if each["oid"] in self.hub.lfs else each | {"actions": upload})
            self._answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "not what was announced"})
        self.hub.lfs[oid] = self.body
        self._answer(200, {})

    def commit(self, name: str, revision: str):
        if repository := self._writable(name):
            there = repository.at(revision)
            if there is None:
                return self._answer(404, {"error": "no branch"}, {"X-Error-Code": "RevisionNotFound"})
            files, summary = dict(there[1]), ""
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    summary = value["summary"]
                elif item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = self.hub.lfs[value["oid"]]
                elif item["key"] == "deletedFile":
                    del files[value["path"]]
            oid = repository.commit(files, revision, summary)
            self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def branch(self, name: str, branch: str):
        if repository := self._writable(name):
            if branch in repository.branches:
                return self._answer(409, {"error": "the branch exists"})
            repository.branches[branch] = repository.branches["main"]
            self._answer(200, {})

    def dataset(self, name: str, _revision: str | None = None):
        if name not in self.hub.datasets:
            return self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        self._answer(200, {"id": name, "sha": self.hub.datasets[name], "siblings": [], "tags": []})


_NAME, _REVISION = r"([^/]+/[^/]+|[^/]+)", r"([^/]+)"
_ROUTES = [
    (rf"/api/models/{_NAME}/revision/{_REVISION}", "GET", _Handler.info),
    (rf"/api/models/{_NAME}/tree/{_REVISION}", "GET", _Handler.tree),
    (rf"/api/models/{_NAME}/preupload/{_REVISION}", "POST", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/{_REVISION}", "POST", _Handler.commit),
    (rf"/api/models/{_NAME}/branch/{_REVISION}", "POST", _Handler.branch),
    (rf"/api/models/{_NAME}", "GET", _Handler.info),
    (rf"/api/datasets/{_NAME}/revision/{_REVISION}", "GET", _Handler.dataset),
    (rf"/api/datasets/{_NAME}", "GET", _Handler.dataset),
    (r"/api/repos/create", "POST", _Handler.create),
    (r"/api/validate-yaml", "POST", _Handler.validate),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (r"/lfs/([0-9a-f]{64})", "PUT", _Handler.put),
    (rf"/{_NAME}/resolve/{_REVISION}/(.+)", "GET", _Handler.resolve),
    (rf"/{_NAME}/resolve/{_REVISION}/(.+)", "HEAD", _Handler.resolve),
]
