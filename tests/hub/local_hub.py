"""A Hub on this machine: as much of the HTTP API of huggingface.co as pushing and pulling models and data sets takes.

The endpoints, headers and error codes are those that huggingface_hub asks for and looks at. Repositories live in memory:
a commit is a mapping from paths to contents.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_writer": "user", "hf_reader": "reader"}


@dataclass
class Repo:
    """Branches are names of commits, commits are mappings from paths to contents."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lfs_paths: set[str] = field(default_factory=set)

    def commit(self, branch: str, files: dict[str, bytes], deleted: Collection[str] = ()) -> str:
        parent = self.branches.get(branch, "")
        there = {path: data for path, data in self.commits.get(parent, {}).items() if path not in deleted}
        tree = {**there, **files}
        payload = parent + "".join(f"{path}{_sha256(data)}" for path, data in sorted(tree.items()))
        sha = hashlib.sha1(payload.encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match."""

    pattern: str
    status: int | None = None
    cut_after: int | None = None
    times: int = 1


class LocalHub:
    """The server. `url` is what HF_ENDPOINT is set to; `requests` has every request as (method, path, status)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.ranges: list[str] = []
        self.authorizations: list[str | None] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.connections: set[Any] = set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops it, with all connections that clients keep open."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(2)

    def add_repo(self, repo_id: str, files: dict[str, bytes], *, branch: str = "main", **options: Any) -> str:
        """A repository as someone else may have made it, also one that no client of ours would make."""
        repo = self.repos.setdefault(repo_id, Repo(**options))
        repo.lfs_paths |= {path for path in files if _is_lfs(path)}
        return repo.commit(branch, files)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches.get(revision, revision)]

    @contextmanager
    def fault(self, pattern: str, **options: Any) -> Iterator[Fault]:
        fault = Fault(pattern, **options)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)


class _Refusal(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -- plumbing ------------------------------------------------------------------------------------------------------

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.sent = 0
        route = f"{self.command} {parts.path}"
        body = self._body()
        self.hub.authorizations.append(self.headers.get("Authorization"))
        try:
            with self.hub.lock:
                self.active_fault = self._next_fault(route)
                if self.active_fault is not None and self.active_fault.status is not None:
                    raise _Refusal(self.active_fault.status, message="a fault of the test")
                self._dispatch(route, body)
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            if refusal.message:
                headers["X-Error-Message"] = refusal.message
            self._reply(refusal.status, {"error": refusal.message or refusal.code or "refused"}, headers)
        self.hub.requests.append((self.command, parts.path, self.sent))

    def _next_fault(self, route: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, route):
                fault.times -= 1
                return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().strip(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(
        self, status: int, content: Any = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.sent = status
        self.send_response(status)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.active_fault.cut_after if self.active_fault is not None else None
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:  # the connection breaks in the middle of a file
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    # -- the API -------------------------------------------------------------------------------------------------------

    def _dispatch(self, route: str, body: bytes) -> None:
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, route):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                getattr(self, method)(body=body, **groups)
                return
        raise _Refusal(404, message=f"no such endpoint: {route}")

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = TOKENS.get(header.removeprefix("Bearer "))
        if user is None:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return user

    def _repo(self, repo_id: str, *, write: bool = False, files: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(repo_id)
        mine = repo_id.partition("/")[0] == user
        if repo is None or (repo.private and not mine):
            raise _Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not mine:
            raise _Refusal(403, message="You need write access") if user else _Refusal(401, message="No token")
        if files and repo.gated and not mine:
            raise _Refusal(403 if user else 401, "GatedRepo", "Access to this model is restricted")
        return repo

    def _tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.resolve(revision)
        if sha is None:
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        return sha, repo.commits[sha]

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        user = self._user()
        if user is None:
            raise _Refusal(401, message="No token")
        owner = asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if owner != user:
            raise _Refusal(403, message="You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repos:
            self._reply(409, {**url, "error": "You already created this model repo"})
            return
        self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        self.hub.repos[repo_id].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._reply(200, url)

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        self._reply(200, self._info(repo, found, *self._tree(found, revision)))

    def _info(self, repo_id: str, repo: Repo, sha: str, tree: dict[str, bytes]) -> dict[str, Any]:
        card = _card(tree.get("README.md", b""))
        tags = [*card.get("tags", []), *([card["library_name"]] if "library_name" in card else [])]
        return {
            "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "downloads": 7, "likes": 0,
            "gated": "manual" if repo.gated else False, "lastModified": "2026-01-01T00:00:00.000Z",
            "tags": tags, "cardData": card, "siblings": [{"rfilename": path, "size": len(data)} for path, data in tree.items()],
        }  # fmt: skip

    def list(self, body: bytes) -> None:
        user = self._user()
        found = []
        for repo_id, repo in sorted(self.hub.repos.items()):
            if repo.private and repo_id.partition("/")[0] != user:
                continue
            info = self._info(repo_id, repo, *self._tree(repo, "main"))
            wanted = set(self.query.get("filter", []))
            search = self.query.get("search", [""])[0].lower()
            author = self.query.get("author", [repo_id.partition("/")[0]])[0]
            if wanted <= set(info["tags"]) and search in repo_id.lower() and author == repo_id.partition("/")[0]:
                found.append(info)
        limit, start = 2, int(self.query.get("cursor", ["0"])[0])  # small pages, so that clients must turn them
        more = start + limit < len(found)
        query = "&".join(f"{key}={value}" for key, values in self.query.items() if key != "cursor" for value in values)
        link = f'<{self.hub.url}/api/models?{query}&cursor={start + limit}>; rel="next"'
        self._reply(200, found[start : start + limit], {"Link": link} if more else {})

    def refs(self, body: bytes, repo: str) -> None:
        branches = self._repo(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self._reply(200, {"branches": listed, "converts": [], "tags": [], "pullRequests": []})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        found = self._repo(repo, write=True)
        if name in found.branches:
            raise _Refusal(409, message="Reference already exists")
        found.branches[name] = found.branches["main"]
        self._reply(200, {})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo)
        _, tree = self._tree(found, revision)
        listed = []
        for path, data in tree.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_sha1(data)}
            if path in found.lfs_paths:
                entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
            listed.append(entry)
        self._reply(200, listed)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._tree(self._repo(repo, write=True), revision)
        files = [
            {"path": file["path"], "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._reply(200, {"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        self._repo(repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify/{wanted['oid']}"},
                }
            objects.append(answer)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if _sha256(body) != oid:
            raise _Refusal(400, message="the content is not what its hash says")
        self.hub.objects[oid] = body
        self._reply(200)

    def lfs_verify(self, body: bytes, oid: str) -> None:
        if json.loads(body)["size"] != len(self.hub.objects[oid]):
            raise _Refusal(400, message="size")
        self._reply(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        self._tree(found, revision)
        files: dict[str, bytes] = {}
        deleted: set[str] = set()
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                found.lfs_paths.add(value["path"])
            elif operation["key"] == "deletedFile":
                deleted.add(value["path"])
        branch, answer = revision, {}
        if self.query.get("create_pr"):
            branch = "refs/pr/1"
            found.branches[branch] = found.branches[revision]
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        sha = found.commit(branch, files, deleted)
        self._reply(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, **answer})

    def validate_yaml(self, body: bytes) -> None:
        self._reply(200, {"errors": [], "warnings": []})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo, files=True)
        sha, tree = self._tree(found, revision)
        if path not in tree:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        data = tree[path]
        etag = _sha256(data) if path in found.lfs_paths else _git_sha1(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._reply(206, data[start:], headers)
        else:
            self._reply(200, data, headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_PLACE = "(?:/datasets)?"  # names are of models or data sets; nothing in the tests is both
_ROUTES = [
    (r"POST /api/repos/create", "create"),
    (r"GET /api/models", "list"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"GET /api/(?:models|datasets)/{_REPO}", "info"),
    (rf"GET /api/(?:models|datasets)/{_REPO}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET /api/(?:models|datasets)/{_REPO}/refs", "refs"),
    (rf"GET /api/(?:models|datasets)/{_REPO}/tree/(?P<revision>[^/]+)", "tree"),
    (rf"POST /api/(?:models|datasets)/{_REPO}/branch/(?P<name>.+)", "branch"),
    (rf"POST /api/(?:models|datasets)/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST /api/(?:models|datasets)/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"POST {_PLACE}/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (r"POST /lfs-verify/(?P<oid>[0-9a-f]{64})", "lfs_verify"),
    (rf"(?:GET|HEAD) {_PLACE}/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".png", ".parquet"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card(readme: bytes) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---", readme.decode(errors="replace"), re.DOTALL)
    return yaml.safe_load(match.group(1)) if match else {}
