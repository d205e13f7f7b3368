"""A Hub on the loopback interface: enough of its protocol for huggingface_hub to push and to load, and for things to go wrong.

Two servers: the Hub itself, and beside it, under another address, the storage of large files, so that a test sees which of them a
token was sent to. Requests are counted and bounded, and both servers end with the process.
"""

import base64
import functools
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MOST_REQUESTS, MOST_BYTES = 400, 64 << 20
LARGE = (".safetensors", ".png", ".wav", ".parquet")
TOKENS = {"hf_" + "m" * 34: "me", "hf_" + "o" * 34: "other"}
MINE, OTHERS = TOKENS


@dataclass
class Repo:
    """Files by commit, commits by branch."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Failure:
    """What goes wrong with the next `times` requests of this method and path: a status, or "cut" closes the connection."""

    method: str
    path: str
    status: int | str
    times: int = 1 << 30


@dataclass
class Seen:
    """A request as it came."""

    method: str
    path: str
    host: str
    token: str | None


class LoopbackHub:
    """State of the Hub, and what was asked of it."""

    def __init__(self):
        self.server, self.storage = (
            ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}), bind_and_activate=False)
            for _ in range(2)
        )
        for server in (self.server, self.storage):
            server.daemon_threads = True
            server.server_bind()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.storage.server_port}"
        self.clear()

    def start(self) -> None:
        for server in (self.server, self.storage):
            server.server_activate()
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        for server in (self.server, self.storage):
            server.shutdown()
            server.server_close()

    def clear(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.datasets: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.failures: list[Failure] = []
        self.meanwhile: tuple[str, Callable[[], object]] | None = (
            None  # done once, before a path that matches is answered
        )

    def fail(self, method: str, path: str, status: int | str, times: int = 1 << 30) -> None:
        self.failures.append(Failure(method, path, status, times))

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository that is already there."""
        self.repos[repo] = Repo(private)
        self.repos[repo].commit("main", files, "initial commit")
        return self.repos[repo]


@functools.cache
def shared() -> LoopbackHub:
    """The one of this process. Its port is taken at once, so that HF_ENDPOINT can name it; it answers after `start`."""
    return LoopbackHub()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, *args):
        pass

    def _serve(self):
        hub, url = self.hub, urlsplit(self.path)
        self.path_only, self.query = unquote(url.path), parse_qs(url.query)
        self.prefix = ""  # of data sets, whose calls are those of models at another place
        match = re.fullmatch(r"(/api)?/datasets/([^/]+/[^/]+?)(\.git/.+|/.+|)", self.path_only)
        if match and f"datasets/{match[2]}" in hub.repos:
            self.prefix = "datasets/"
            self.path_only = f"{'/api/models' if match[1] else ''}/{match[2]}{match[3]}"
        header = self.headers.get("Authorization", "")
        self.token = header.removeprefix("Bearer ") or None
        hub.seen.append(Seen(self.command, self.path_only, self.headers["Host"], self.token))
        if len(hub.seen) > MOST_REQUESTS:
            return self._answer(508, {"error": "too many requests for one test"})
        if hub.meanwhile and re.search(hub.meanwhile[0], self.path_only):
            do, hub.meanwhile = hub.meanwhile[1], None
            do()
        for failure in hub.failures:
            if failure.times and failure.method == self.command and re.search(failure.path, self.path_only):
                failure.times -= 1
                if failure.status == "cut":
                    self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
                    self.close_connection = True
                    return self.connection.shutdown(2)
                self._body()
                return self._answer(failure.status, {"error": f"injected {failure.status}"})
        for method, pattern, handler in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, self.path_only)):
                return handler(self, self._body(), *match.groups())
        self._body()
        return self._answer(404, {"error": f"unknown {self.command} {self.path_only}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 (the names that http.server calls)

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        if length > MOST_BYTES:
            raise ConnectionError("too large for a test")
        data = self.rfile.read(length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def _answer(self, status, value=None, headers=None, raw=None, length=None):
        data = raw if raw is not None else json.dumps(value).encode()
        if (
            status == 200
            and raw is not None
            and (part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")))
        ):
            status, data = 206, data[int(part[1]) : int(part[2]) + 1]
        self.send_response(status)
        if isinstance(value, dict) and status >= 400:
            self.send_header("X-Error-Message", str(value.get("error", "")))
        for name, content in {
            "Content-Length": str(len(data) if length is None else length),
            **(headers or {}),
        }.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repo(self, name, write=False):
        """The repository, if this token may; otherwise answers itself and returns None."""
        repo, user = self.hub.repos.get(self.prefix + name), TOKENS.get(self.token)
        owner = name.split("/")[0] == user
        if repo is None or (repo.private and not owner):
            self._answer(404 if user else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if write and not owner:
            self._answer(403 if user else 401, {"error": "Forbidden: you may not write here"})
            return None
        return repo

    def _sha(self, repo, revision):
        sha = repo.branches.get(revision, revision if revision in repo.commits else None)
        if sha is None:
            self._answer(404, {"error": f"no revision {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return sha

    # -- the calls

    def whoami(self, body):
        if self.token not in TOKENS:
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        return self._answer(200, {"name": TOKENS[self.token], "type": "user", "orgs": []})

    def create(self, body):
        asked, user = json.loads(body), TOKENS.get(self.token)
        if user is None:
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        owner = asked.get("organization") or user
        if owner != user:
            return self._answer(403, {"error": f"Forbidden: no rights to create under {owner}"})
        name = f"{owner}/{asked['name']}"
        key = f"datasets/{name}" if asked.get("type") == "dataset" else name
        answer = {"url": f"{self.hub.endpoint}/{key}", "name": name}
        if key in self.hub.repos:
            return self._answer(409, {**answer, "error": "You already created this model repo"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add(key, {".gitattributes": b"*.safetensors filter=lfs\n"}, bool(private))
        return self._answer(200, answer)

    def validate(self, body):
        return self._answer(200, {"errors": [], "warnings": []})

    def branch(self, body, name, branch):
        if repo := self._repo(name, write=True):
            if branch in repo.branches:
                return self._answer(409, {"error": "branch exists"})
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            repo.branches[branch] = repo.branches[start]
            return self._answer(200, {})

    def info(self, body, name, revision="main"):
        repo = self._repo(name)
        if repo and (sha := self._sha(repo, revision)):
            files = [{"rfilename": path} for path in repo.commits[sha]]
            answer = {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": files, "tags": []}
            self._answer(200, answer)

    def dataset(self, body, name):
        if name in self.hub.datasets:
            return self._answer(200, {"id": name, "sha": "0" * 40, "private": False, "siblings": [], "tags": []})
        return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def preupload(self, body, name, revision):
        repo = self._repo(name, write="create_pr" not in self.query)
        if repo and (sha := self._sha(repo, revision)):
            files = []
            for asked in json.loads(body)["files"]:
                path, known = asked["path"], repo.commits[sha].get(asked["path"])
                mode = "lfs" if path.endswith(LARGE) else "regular"
                oid = None if known is None else _sha256(known) if mode == "lfs" else _blob(known)
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer(200, {"files": files})

    def lfs_batch(self, body, name):
        if self._repo(name) and self.token in TOKENS:  # of a pull request, too
            objects = []
            for asked in json.loads(body)["objects"]:
                known = asked["oid"] in self.hub.large
                href = f"{self.hub.storage_url}/storage/{asked['oid']}"
                verify = f"{self.hub.endpoint}/{name}/verify"
                actions = {"upload": {"href": href}, "verify": {"href": verify}}
                objects.append({**asked, **({} if known else {"actions": actions})})
            self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        if _sha256(body) != oid:
            return self._answer(400, {"error": "the content is not what was announced"})
        self.hub.large[oid] = body
        return self._answer(200, {})

    def stored(self, body, oid):
        return self._answer(200, raw=self.hub.large[oid], headers={"ETag": f'"{oid}"'})

    def paths(self, body, name, revision):
        repo = self._repo(name)
        if repo and (sha := self._sha(repo, revision)):
            asked = parse_qs(body.decode())["paths"] if not body.startswith(b"{") else json.loads(body)["paths"]
            self._answer(200, _entries(repo.commits[sha], lambda path: path in asked))

    def verify(self, body, name):
        asked = json.loads(body)
        good = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        return self._answer(200 if good else 400, {})

    def commit(self, body, name, revision):
        repo = self._repo(name, write="create_pr" not in self.query)
        if not repo or not (sha := self._sha(repo, revision)):
            return
        files, message, parent = dict(repo.commits[sha]), "", None
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message, parent = value["summary"], value.get("parentCommit")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self._answer(400, {"error": f"{value['path']} was never uploaded"})
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        if parent not in (None, sha):
            return self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        pull = "refs/pr/1" if "create_pr" in self.query else None
        made = repo.commit(pull or revision, files, message)
        answer = {
            "success": True,
            "commitOid": made,
            "commitUrl": f"{self.hub.endpoint}/{self.prefix}{name}/commit/{made}",
        }
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/1"
        self._answer(200, answer)

    def tree(self, body, name, revision, folder):
        repo = self._repo(name)
        if repo and (sha := self._sha(repo, revision)):
            self._answer(200, _entries(repo.commits[sha], lambda path: path.startswith((folder or "").strip("/"))))

    def resolve(self, body, name, revision, path):
        repo = self._repo(name)
        if not repo or not (sha := self._sha(repo, revision)):
            return
        data, commit = repo.commits[sha].get(path), {"X-Repo-Commit": sha}
        if data is None:
            return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", **commit})
        if not path.endswith(LARGE):
            return self._answer(200, raw=data, headers={"ETag": f'"{_blob(data)}"', **commit})
        oid = _sha256(data)
        self.hub.large[oid] = data
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data)), **commit}
        return self._answer(302, raw=b"", headers={"Location": f"{self.hub.storage_url}/storage/{oid}", **linked})


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/datasets/{_NAME}", _Handler.dataset),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/paths-info/(.+)", _Handler.paths),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/storage/(\w+)", _Handler.store),
    ("GET", r"/storage/(\w+)", _Handler.stored),
    ("HEAD", r"/storage/(\w+)", _Handler.stored),
    ("POST", rf"/{_NAME}/verify", _Handler.verify),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(/.+)?", _Handler.tree),
    ("HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _entries(files: dict[str, bytes], wanted=lambda path: True) -> list[dict]:
    entries = []
    for path, data in files.items():
        if wanted(path):
            entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
    return entries


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
