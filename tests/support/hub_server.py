"""A small Hub on loopback that answers the client's own protocol: repositories, branches, tags, commits, LFS, resolve.

Everything is in memory. `Hub.requests` is what was asked, and `cut`, `hangs_up`, `answers` and `lies` make it
misbehave.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".bin", ".png")
READ, WRITE = "hf_reads", "hf_writes"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branches, tags as "refs/tags/…", pull requests
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        for name in (revision, f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        return revision if revision in self.commits else None


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)  # file: after how many bytes each answer breaks off
    answers: dict[str, int] = field(default_factory=dict)  # a piece of a path: the status it is answered with
    hangs_up: set[str] = field(default_factory=set)  # pieces of paths at which the line goes dead
    lies: dict[str, dict[str, str]] = field(default_factory=dict)  # the end of a path: headers it is answered with
    before: dict[str, Callable[[], None]] = field(default_factory=dict)  # the end of a path: called before the answer
    prs: int = 0

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo].find(revision)
        assert found is not None
        return self.repos[repo].commits[found]

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """What somebody else committed."""
        held = self.repos.setdefault(repo, Repo())
        before = held.commits[held.refs[revision]] if revision in held.refs else {}
        return held.commit(revision, {**before, **files}, "put")

    def asked(self, method: str, piece: str = "") -> list[str]:
        return [path for m, path, _ in self.requests if m == method and piece in path]


def oid_of(path: str, data: bytes) -> str:
    if path.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # ---- answering

    def say(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", **(headers or {}), **self.lie()}
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def lie(self) -> dict[str, str]:
        path = unquote(urlsplit(self.path).path)
        return next((said for end, said in self.hub.lies.items() if path.endswith(end)), {})

    def fail(self, status: int, code: str | None = None, message: str = "no") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.say(status, {"error": message}, headers)

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        data = self.body()
        self.hub.requests.append((self.command, unquote(path), dict(self.headers)))
        for end, call in self.hub.before.items():
            if path.endswith(end):
                call()
        if any(piece in path for piece in self.hub.hangs_up):
            self.close_connection = True
            return self.connection.close()
        for piece, status in self.hub.answers.items():
            if piece in path:
                return self.fail(status, message="told to")
        if self.token() not in (None, READ, WRITE):
            return self.fail(401, message="Invalid credentials in Authorization header")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            return self.route(path, query, data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, path: str, query: dict[str, list[str]], data: bytes) -> None:
        hub = self.hub
        if self.command == "POST" and self.token() != WRITE and path != "/api/validate-yaml":
            return self.fail(403 if self.token() else 401, message="You need a token with the right to write")
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in hub.repos
            if not there:
                private = asked.get("private") or asked.get("visibility") == "private"
                hub.repos[name] = Repo(private=bool(private))
                hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
            return self.say(409 if there else 200, {**answer, "error": "You already created this model repo"})
        if path == "/api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---", json.loads(data)["content"], re.S)
            try:
                held = yaml.safe_load(front[1]) if front else {}
                bad = [] if isinstance(held, dict) else [{"message": "front matter is no mapping"}]
                if isinstance(held, dict) and not isinstance(held.get("license", ""), str):
                    bad.append({"message": '"license" must be a string'})
            except yaml.YAMLError as error:
                bad = [{"message": str(error).split("\n")[0]}]
            return self.say(400 if bad else 200, {"errors": bad, "warnings": []})
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            assert hashlib.sha256(data).hexdigest() == found[1]
            hub.blobs[found[1]] = data
            return self.say(200)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(data))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self.model(found[1], found[2] or "", query, data)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], unquote(found[2]), unquote(found[3]))
        return self.fail(404, message=f"this Hub has no {path}")

    def seen(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        return None if repo is None or (repo.private and self.token() is None) else repo

    def batch(self, asked: Any) -> None:
        objects = []
        for item in asked["objects"]:
            new = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(item if item["oid"] in self.hub.blobs else {**item, "actions": new})
        self.say(200, {"transfer": "basic", "objects": objects})

    # ---- a repository

    def model(self, name: str, rest: str, query: dict[str, list[str]], data: bytes) -> None:
        repo = self.seen(name)
        if repo is None:
            return self.fail(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        verb, _, revision = rest.lstrip("/").partition("/")
        revision = unquote(revision)
        if verb == "branch" or verb == "tag":
            asked = json.loads(data or b"{}")
            ref = f"refs/tags/{asked['tag']}" if verb == "tag" else revision
            if ref in repo.refs:
                return self.fail(409, message=f"Reference {ref} already exists")
            at = repo.find(revision if verb == "tag" else asked.get("startingPoint") or "main")
            if at is None:
                return self.fail(404, "RevisionNotFound", "no such revision")
            repo.refs[ref] = at
            return self.say(200)
        if verb == "refs":
            branches = [n for n in repo.refs if not n.startswith("refs/")]
            tags = [n.removeprefix("refs/tags/") for n in repo.refs if n.startswith("refs/tags/")]
            kinds = {"branches": branches, "tags": tags, "converts": []}

            def listed(names: list[str]) -> list[dict[str, Any]]:
                return [{"name": n, "ref": n, "targetCommit": repo.find(n)} for n in names]

            return self.say(200, {kind: listed(names) for kind, names in kinds.items()})
        oid = repo.find(revision or "main")
        if oid is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[oid]
        if verb in ("", "revision"):
            info = {"id": name, "modelId": name, "sha": oid, "private": repo.private, "tags": []}
            return self.say(200, {**info, "siblings": [{"rfilename": path} for path in sorted(files)]})
        if verb == "tree":
            sized = [{"path": p, "size": len(d), "oid": oid_of(p, d)} for p, d in sorted(files.items())]
            return self.say(200, [{"type": "file", **entry} for entry in sized])
        if verb == "preupload":
            names = [f["path"] for f in json.loads(data)["files"]]
            modes = {n: "lfs" if n.endswith(LFS) else "regular" for n in names}
            oids = {n: oid_of(n, files[n]) if n in files else None for n in names}
            answers = [{"path": n, "uploadMode": modes[n], "shouldIgnore": False, "oid": oids[n]} for n in names]
            return self.say(200, {"files": answers})
        if verb == "commit":
            return self.commit(name, repo, revision, dict(files), query, data)
        return self.fail(404, message=f"this Hub has no {rest}")

    def commit(
        self, name: str, repo: Repo, revision: str, files: dict[str, bytes], query: dict[str, list[str]], data: bytes
    ) -> None:
        message = ""
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        answer: dict[str, Any] = {}
        if query.get("create_pr") == ["1"]:
            self.hub.prs += 1
            revision = f"refs/pr/{self.hub.prs}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{self.hub.prs}"
        oid = repo.commit(revision, files, message)
        oid = self.commit_id(oid)
        self.say(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, **answer})

    def commit_id(self, oid: str) -> str:
        """What an answer calls a commit; a test may have it say another."""
        return oid

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.seen(name)
        if repo is None:
            return self.fail(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        if repo.gated and self.token() != WRITE:
            return self.fail(403, "GatedRepo", "Access to this model is restricted")
        oid = repo.find(revision)
        if oid is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        data = repo.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if data is None:
            return self.say(404, {"error": "no"}, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "no"})
        etag = oid_of(path, data)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))} if path.endswith(LFS) else {}
        start = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, "0"])[1])
        part = data[start:]
        self.send_response(206 if start else 200)
        headers |= linked | {"ETag": f'"{etag}"', "Content-Length": str(len(part))} | self.lie()
        for key, text in headers.items():
            self.send_header(key, text)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        stops = self.hub.cut.get(path)
        if stops:
            self.wfile.write(part[: stops.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(part)
        return None


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
