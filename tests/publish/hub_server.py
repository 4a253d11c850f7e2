"""A Hub on this machine: the part of huggingface.co's HTTP API by which a model is published.

Written from what huggingface_hub 2.4 sends (``hf_api.py``, ``_commit_api.py``, ``lfs.py``,
``file_download.py``, ``utils/_http.py``), from its documentation of the API and from the Git LFS
batch API (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md, with the Hub's own
multipart transfer). It keeps what a Hub keeps: repositories with branches of commits, objects of
large files by SHA-256 and repository, whether a repository is private, and who may write where.
A request that it does not know is answered with 501 and noted in `Hub.unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# Of the .gitattributes that the Hub puts into a new model repository.
LARGE = (".safetensors", ".bin", ".gguf", ".pt", ".h5", ".onnx", ".npy", ".npz", ".zip", ".model")
REGULAR_LIMIT = 10_000_000
PAGE = 1000
_ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE).encode()


def git_oid(data: bytes) -> str:
    """SHA-1 of a blob as git counts it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a commit; `sha256` of one that lies in the large file storage."""

    oid: str
    size: int
    data: bytes | None = None
    sha256: str | None = None
    pointer_size: int = 0


@dataclass
class Repo:
    """A repository: `branches` name -> files of its head, `heads` name -> commit."""

    private: bool
    gated: Any = False
    branches: dict[str, dict[str, Blob]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # of large files, by SHA-256

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        facts = json.dumps([branch, message, sorted((p, b.oid) for p, b in files.items())])
        oid = hashlib.sha1(f"{len(self.messages)}{facts}".encode()).hexdigest()
        self.branches[branch], self.heads[branch], self.commits[oid] = files, oid, files
        self.messages.append(message)
        return oid


class Hub:
    """``with Hub({"token": ["user", "org"]}) as hub:`` serves at ``hub.url``.

    Args:
        tokens: the names that each may write under, its user's own first.
        chunk: large files from this size on are sent in parts of it [bytes].
        readers: tokens that may only read.

    Attributes:
        repos: by id.
        requests: (method, path, bytes of the body) of each.
        stored: SHA-256 of each object, once for every time that it arrived whole.
        headers: of each request.
        on_store: called with the URL's path and the body's length before the body of an upload is
            read; a ConnectionError cuts the connection.
        on_preupload: the same, with the paths that are asked about.
        xet: address of a content-addressed storage, which clients with hf_xet are sent to;
            ``local://DIRECTORY`` is one that hf_xet itself keeps.
        unknown: requests that this server does not know.
    """

    def __init__(
        self, tokens: dict[str, list[str]], *, chunk: int = 1 << 30, readers: tuple[str, ...] = ()
    ) -> None:
        self.tokens, self.chunk, self.readers = tokens, chunk, readers
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.headers: list[dict[str, str]] = []
        self.stored: list[str] = []
        self.unknown: list[str] = []
        self.on_store: Callable[[str, int], None] | None = None
        self.on_preupload: Callable[[list[str]], None] | None = None
        self.xet: str | None = None
        self.parts: dict[tuple[str, str], dict[int, bytes]] = {}
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Large files lie behind another host's name, as the Hub's do; clients do not follow there
        # before they have read the headers, nor take the token along.
        self.storage = f"http://localhost:{self.server.server_address[1]}/storage"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def make(self, name: str, *, private: bool) -> Repo:
        repo = self.repos[name] = Repo(private)
        blob = Blob(git_oid(_ATTRIBUTES), len(_ATTRIBUTES), _ATTRIBUTES)
        repo.commit("main", {".gitattributes": blob}, "initial commit")
        return repo

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """Content of a branch, without .gitattributes."""
        repo = self.repos[name]
        return {
            path: repo.objects[blob.sha256] if blob.sha256 else blob.data or b""
            for path, blob in repo.branches[branch].items()
            if path != ".gitattributes"
        }


class _Answer(Exception):
    """Ends a request with an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


_ID = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("GET", r"/api/agent-harnesses", "harnesses"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"/api/models/{_ID}", "info"),
    ("GET", rf"/api/models/{_ID}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/models/{_ID}/refs", "refs"),
    ("POST", rf"/api/models/{_ID}/branch/(?P<branch>[^/]+)", "branch"),
    ("PUT", rf"/api/models/{_ID}/settings", "settings"),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{_ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"/api/models/{_ID}/xet-(?P<kind>write|read)-token/(?P<revision>[^/]+)", "xet_token"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", rf"/storage/{_ID}/(?P<oid>[0-9a-f]{{64}})(?:/(?P<part>\d+))?", "store"),
    ("POST", rf"/storage/{_ID}/(?P<oid>[0-9a-f]{{64}})/complete", "complete"),
    ("POST", rf"/storage/{_ID}/(?P<oid>[0-9a-f]{{64}})/verify", "verify"),
    ("GET", rf"/storage/{_ID}/(?P<oid>[0-9a-f]{{64}})", "fetch"),
    ("GET", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms behind its headers

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("GET")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def do_DELETE(self) -> None:
        self.route("DELETE")

    def route(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.hub.headers.append(dict(self.headers.items()))
        try:
            for verb, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, path)
                if verb == method and found:
                    if name == "store" and self.hub.on_store:
                        self.hub.on_store(path, int(self.headers.get("Content-Length") or 0))
                    body = self.body()
                    self.hub.requests.append((self.command, path, len(body)))
                    parts = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                    with self.hub.lock:
                        getattr(self, name)(body, **parts)
                    return
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise _Answer(501, "this server does not know that")
        except _Answer as answer:
            headers = {"X-Error-Message": answer.message}
            if answer.code:
                headers["X-Error-Code"] = answer.code
            self.reply(answer.status, {"error": answer.message}, headers)
        except ConnectionError:
            self.close_connection = True
            self.connection.close()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the client went away")
        return data

    def reply(
        self,
        status: int,
        value: Any = None,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
    ) -> None:
        sent = data if data is not None else json.dumps(value).encode()
        self.send_response(status)
        if data is None:
            self.send_header("Content-Type", "application/json; charset=utf-8")
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    # Who asks, and what for

    def names(self) -> list[str] | None:
        """The names that the token may write under; None without a token."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        kind, _, token = given.partition(" ")
        if kind != "Bearer" or token not in self.hub.tokens:
            raise _Answer(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def found(self, name: str, *, write: bool = False) -> Repo:
        """The repository, if whoever asks may see it (and write it)."""
        names = self.names()
        repo, owner = self.hub.repos.get(name), name.split("/")[0]
        if repo is None or (repo.private and owner not in (names or [])):
            if names is None:
                raise _Answer(401, "Invalid username or password.")
            raise _Answer(404, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(owner, names)
        return repo

    def may_write(self, owner: str, names: list[str] | None) -> None:
        if names is None:
            raise _Answer(401, "Invalid username or password.")
        token = self.headers["Authorization"].partition(" ")[2]
        if owner not in names:
            raise _Answer(
                403, f'You don\'t have the rights to create a model under the namespace "{owner}"'
            )
        if token in self.hub.readers:
            raise _Answer(403, "Forbidden: pass a token with write access")

    def head(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        oid = repo.heads.get(revision, revision)
        if oid not in repo.commits:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    # The API

    def harnesses(self, body: bytes) -> None:
        self.reply(200, {"standardEnvVars": [], "harnesses": {}})

    def whoami(self, body: bytes) -> None:
        names = self.names()
        if names is None:
            raise _Answer(401, "Invalid username or password.")
        orgs = [{"name": name} for name in names[1:]]
        self.reply(200, {"type": "user", "name": names[0], "orgs": orgs})

    def validate(self, body: bytes) -> None:
        asked = json.loads(body)
        found = re.match(r"\A---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        errors = []
        try:
            value = yaml.safe_load(found[1]) if found else {}
            if not isinstance(value, dict):
                errors.append({"message": "metadata is no mapping"})
            elif "model-index" in value and not all(
                {"name", "results"} <= set(one) for one in value["model-index"]
            ):
                errors.append({"message": '"model-index[0].results" is required'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, body: bytes) -> None:
        asked, names = json.loads(body), self.names()
        if names is None:
            raise _Answer(401, "Invalid username or password.")
        owner = asked.get("organization") or names[0]
        name = f"{owner}/{asked['name']}"
        self.may_write(owner, names)
        if name in self.hub.repos:
            raise _Answer(409, "You already created this model repo")
        self.hub.make(name, private=asked.get("visibility") == "private")
        self.reply(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "0" * 24})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self.found(repo)
        oid, files = self.head(found, revision)
        self.reply(
            200,
            {
                "id": repo,
                "sha": oid,
                "private": found.private,
                "gated": found.gated,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            },
        )

    def tree(self, body: bytes, repo: str, revision: str, path: str = "") -> None:
        _, files = self.head(self.found(repo), revision)
        query = parse_qs(urlsplit(self.path).query)
        rows: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(files.items()):
            if path and not name.startswith(f"{path}/"):
                continue
            inner = name.removeprefix(f"{path}/") if path else name
            parts = inner.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(([path] if path else []) + parts[:depth])
                rows[folder] = {
                    "type": "directory", "path": folder, "oid": git_oid(folder.encode()), "size": 0,
                }  # fmt: skip
            row: dict[str, Any] = {
                "type": "file", "path": name, "oid": blob.oid, "size": blob.size,
            }  # fmt: skip
            if blob.sha256:
                row["lfs"] = {
                    "oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size,
                }  # fmt: skip
            rows[name] = row
        if query.get("recursive", ["False"])[0].lower() not in ("true", "1"):
            depth = path.count("/") + 1 if path else 0
            rows = {key: row for key, row in rows.items() if key.count("/") == depth}
        start = int(query.get("cursor", ["0"])[0])
        page = list(rows.values())[start : start + PAGE]
        headers = {}
        if start + PAGE < len(rows):
            more = f"{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={start + PAGE}"
            headers["Link"] = f'<{more}>; rel="next"'
        self.reply(200, page, headers)

    def refs(self, body: bytes, repo: str) -> None:
        found = self.found(repo)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in found.heads.items()
        ]
        self.reply(200, {"branches": branches, "converts": [], "tags": []})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        found = self.found(repo, write=True)
        if branch in found.heads:
            raise _Answer(409, f"Reference already exists: refs/heads/{branch}")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        oid, files = self.head(found, start)
        found.heads[branch], found.branches[branch] = oid, dict(files)
        self.reply(201, {})

    def settings(self, body: bytes, repo: str) -> None:
        found, asked = self.found(repo, write=True), json.loads(body)
        if "gated" in asked:
            found.gated = asked["gated"]
        if "visibility" in asked:
            found.private = asked["visibility"] == "private"
        self.reply(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        found = self.found(repo, write=True)
        _, files = self.head(found, revision)
        rows, asked = [], json.loads(body)["files"]
        if self.hub.on_preupload:
            self.hub.on_preupload([file["path"] for file in asked])
        for file in asked:
            sample, path = base64.b64decode(file["sample"]), file["path"]
            large = (
                path.endswith(LARGE)
                or file["size"] > REGULAR_LIMIT
                or (b"\0" in sample and not path.endswith(".png"))
            )
            row = {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if old := files.get(path):
                row["oid"] = old.sha256 or old.oid
            rows.append(row)
        self.reply(200, {"commitOid": found.heads.get(revision), "files": rows})

    def batch(self, body: bytes, repo: str) -> None:
        found, asked = self.found(repo, write=True), json.loads(body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise _Answer(422, "only uploads by sha256")
        rows = []
        for one in asked["objects"]:
            row: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in found.objects:
                base = f"{self.hub.storage}/{repo}/{one['oid']}"
                upload: dict[str, Any] = {"href": base}
                if one["size"] > self.hub.chunk:
                    count = -(-one["size"] // self.hub.chunk)
                    upload = {
                        "href": f"{base}/complete",
                        "header": {
                            "chunk_size": str(self.hub.chunk),
                            **{f"{i:05d}": f"{base}/{i}" for i in range(1, count + 1)},
                        },
                    }
                row["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            rows.append(row)
        self.reply(200, {"transfer": "multipart", "objects": rows})

    def store(self, body: bytes, repo: str, oid: str, part: str | None = None) -> None:
        # No token: the address itself allows it, as S3's presigned ones do.
        if part is not None:
            self.hub.parts.setdefault((repo, oid), {})[int(part)] = body
            self.reply(200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
            return
        self.keep(repo, oid, body)
        self.reply(200, {})

    def keep(self, repo: str, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise _Answer(400, "the content does not have that SHA-256")
        self.hub.repos[repo].objects[oid] = data
        self.hub.stored.append(oid)

    def complete(self, body: bytes, repo: str, oid: str) -> None:
        asked, parts = json.loads(body), self.hub.parts.pop((repo, oid), {})
        for one in asked["parts"]:
            data = parts.get(one["partNumber"], b"")
            if one["etag"].strip('"') != hashlib.md5(data).hexdigest():
                raise _Answer(400, f"part {one['partNumber']} is not what was sent")
        self.keep(repo, oid, b"".join(parts[number] for number in sorted(parts)))
        self.reply(200, {})

    def verify(self, body: bytes, repo: str, oid: str) -> None:
        asked, found = json.loads(body), self.found(repo, write=True)
        if len(found.objects.get(oid, b"")) != asked["size"]:
            raise _Answer(404, "no such object")
        self.reply(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self.found(repo, write=True)
        if revision not in found.heads:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(found.branches[revision]), ""
        for line in body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "header":
                message = value["summary"]
            elif one["key"] == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = Blob(git_oid(data), len(data), data)
            elif one["key"] == "lfsFile":
                data = found.objects.get(value["oid"])
                if data is None and self.hub.xet is None:
                    raise _Answer(400, f"LFS pointer to a missing object: {value['path']}")
                size = value["size"]
                pointer = (
                    "version https://git-lfs.github.com/spec/v1\n"
                    f"oid sha256:{value['oid']}\nsize {size}\n"
                ).encode()
                files[value["path"]] = Blob(
                    git_oid(pointer), size, None, value["oid"], len(pointer)
                )
            elif one["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise _Answer(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise _Answer(400, f"unknown operation {one['key']}")
        oid = found.commit(revision, files, message)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def xet_token(self, body: bytes, repo: str, kind: str, revision: str) -> None:
        self.found(repo, write=kind == "write")
        if self.hub.xet is None:
            raise _Answer(404, "this Hub has no Xet storage")
        facts = {"casUrl": self.hub.xet, "accessToken": "xet", "exp": 4_000_000_000}
        headers = {
            "X-Xet-Cas-Url": self.hub.xet,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": "4000000000",
        }
        self.reply(200, facts, headers)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        oid, files = self.head(self.found(repo), revision)
        blob = files.get(path)
        if blob is None:
            raise _Answer(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'}
        if blob.sha256:
            headers |= {
                "X-Linked-Etag": f'"{blob.sha256}"',
                "X-Linked-Size": str(blob.size),
                "Location": f"{self.hub.storage}/{repo}/{blob.sha256}",
            }
            self.reply(302, data=b"", headers=headers)
            return
        self.send_data(blob.data or b"", headers)

    def fetch(self, body: bytes, repo: str, oid: str) -> None:
        found = self.hub.repos[repo].objects
        if oid not in found:
            raise _Answer(404, "no such object")
        self.send_data(found[oid], {"ETag": f'"{oid}"'})

    def send_data(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            part = data[start : end + 1]
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
            self.reply(206, data=part, headers=headers)
            return
        if self.command == "HEAD":
            headers = {**headers, "Content-Length": str(len(data))}
        self.reply(200, data=data, headers=headers)
