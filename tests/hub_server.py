"""A Hub of one's own on the loopback: the HTTP that huggingface_hub 2.4, transformers and datasets speak when they
publish and load. Contents go to a folder, named by their sha256.

    create      POST /api/repos/create                         409 for one that exists
    cards       POST /api/validate-yaml                        by card_rules.py
    upload      POST .../preupload/REV, .../info/lfs/objects/batch, PUT /lfs/SHA256, POST .../commit/REV (NDJSON)
    tag         POST .../tag/REV                               409 for one that exists
    look        GET .../api/models/ID[/revision/REV], .../tree/REV[/PATH], POST .../paths-info/REV
    download    HEAD and GET /ID/resolve/REV/PATH          large files: 302 to /cdn/SHA256 of another host, ranges
    collection  POST /api/collections, .../SLUG/items          409 for what is there
    who         GET /api/whoami-v2

It is strict where the Hub is: a write without the token is 401, a private repository is 404 without it, a large file
whose bytes do not have the promised sha256 is refused, and so is a commit of bytes that never came. There is no Xet
here: clients run with HF_HUB_DISABLE_XET=1.

`faults` breaks one answer each: a function of the request path that returns what is to be done with it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from card_rules import card_problems

TOKEN, READ_TOKEN = "hf_token_of_the_tests", "hf_token_that_may_only_read"
USER = "tester"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LARGE = (".safetensors", ".parquet", ".png", ".bin", ".arrow")  # as the Hub's own .gitattributes


@dataclass(frozen=True)
class Blob:
    """A file of a commit: where its bytes are, and what git calls it."""

    sha256: str
    git: str
    size: int
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git


@dataclass
class Repository:
    """Commits, oldest first: (commit id, path -> blob). tags: name -> commit id."""

    private: bool
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        revision = self.tags.get(revision, revision)
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class LocalHub:
    """The server and what it knows. `requests` lists "METHOD /path"; `faults` see the module docstring."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.collections: dict[str, dict] = {}
        self.requests: list[str] = []
        self.faults: list[Callable[[str], str | None]] = []
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # By another name: a client goes after large files only where they are not on the Hub itself.
        self.cdn = f"http://localhost:{port}/cdn"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def store(self, content: bytes, large: bool) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Blob(sha256, git, len(content), large)

    def files(self, kind: str, repo_id: str) -> dict[str, bytes]:
        """Path -> bytes of the newest commit."""
        _, blobs = self.repositories[kind, repo_id].commits[-1]
        return {path: (self.folder / blob.sha256).read_bytes() for path, blob in blobs.items()}

    def fail_once(self, pattern: str, action: str):
        """The next request whose "METHOD /path" matches is answered by `action`."""
        done = []

        def fault(request: str) -> str | None:
            if done or not re.search(pattern, request):
                return None
            done.append(request)
            return action

        self.faults.append(fault)


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """The test log is not for requests."""

    def do(self):
        address = urlparse(self.path)
        self.place, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self.read_body()
        request = f"{self.command} {self.place}"
        with self.hub.lock:
            self.hub.requests.append(request)
            actions = [action for action in (fault(request) for fault in self.hub.faults) if action]
        self.action = actions[0] if actions else None
        if self.action == "refuse":
            return self.answer(400, {"error": "refused"})
        if self.action == "hang up":
            self.close_connection = True
            return None
        for pattern, method, reply in ROUTES:
            match = re.fullmatch(pattern, self.place)
            if match and self.command in method:
                return reply(self, **match.groupdict())
        return self.missing("NotFound")

    do_GET = do_POST = do_PUT = do_HEAD = do

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content=b"", headers: dict | None = None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code: str):
        self.answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def known(self) -> bool:
        """Whether the request carries the token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, kind: str, repo_id: str) -> Repository | None:
        found = self.hub.repositories.get((kind, repo_id))
        return found if found and (self.known or not found.private) else None

    # ---- who, cards, repositories, collections

    def whoami(self):
        role = {f"Bearer {TOKEN}": "write", f"Bearer {READ_TOKEN}": "read"}.get(self.headers.get("Authorization"))
        if role is None:
            return self.answer(401, {"error": "Invalid credentials"})
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
        return self.answer(200, {"type": "user", "name": USER, "orgs": [{"name": "team"}], "auth": auth})

    def validate(self):
        asked = json.loads(self.body)
        problems = card_problems(asked["content"], asked["repoType"])
        errors = [{"message": problem} for problem in problems]
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self):
        if not self.known:
            return self.answer(401, {"error": "Invalid credentials"})
        asked = json.loads(self.body)
        kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"}
        if (kind, repo_id) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", **url})
        if kind == "space" and not asked.get("sdk"):
            return self.answer(400, {"error": "a Space needs an sdk"})
        repository = Repository(asked.get("visibility") == "private")
        first = {".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n", large=False)}
        repository.commits.append((hashlib.sha1(f"{kind} {repo_id}".encode()).hexdigest(), first))
        self.hub.repositories[kind, repo_id] = repository
        return self.answer(200, {**url, "name": repo_id, "id": repo_id})

    def make_collection(self):
        asked = json.loads(self.body)
        slug = f"{asked['namespace']}/{asked['title'].lower()}-{'0' * 24}"
        status = 409 if slug in self.hub.collections else 200
        made = {"slug": slug, "title": asked["title"], "owner": asked["namespace"], "items": [], "upvotes": 0}
        made |= {
            "private": asked["private"],
            "position": 0,
            "theme": "green",
            "lastUpdated": "2026-01-01T00:00:00.000Z",
        }
        return self.answer(status, self.hub.collections.setdefault(slug, made))

    def collection(self, slug):
        return self.answer(200, self.hub.collections[slug])

    def add_item(self, slug):
        item = json.loads(self.body)["item"]
        items = self.hub.collections[slug]["items"]
        if any(there["id"] == item["id"] and there["type"] == item["type"] for there in items):
            return self.answer(409, {"error": "exists"})
        items.append({"_id": str(len(items)), "position": len(items), **item})
        return self.answer(200, self.hub.collections[slug])

    # ---- upload

    def preupload(self, kinds, repo_id, revision):
        repository = self.writable(kinds, repo_id)
        if repository is None:
            return None
        _, blobs = repository.at(revision)
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            oid = blobs[file["path"]].etag if file["path"] in blobs else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer(200, {"files": files})

    def writable(self, kinds: str, repo_id: str) -> Repository | None:
        """The repository, or None after an answer that says why not."""
        if not self.known:
            self.answer(401, {"error": "Invalid credentials"})
        elif (KINDS[kinds], repo_id) not in self.hub.repositories:
            self.missing("RepoNotFound")
        else:
            return self.hub.repositories[KINDS[kinds], repo_id]
        return None

    def lfs_batch(self, kinds, repo_id):
        if self.writable(kinds or "models", repo_id) is None:
            return None
        objects = []
        for asked in json.loads(self.body)["objects"]:
            place = {"oid": asked["oid"], "size": asked["size"]}
            if not (self.hub.folder / asked["oid"]).is_file():
                place["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(place)
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(422, {"error": "the bytes are not those that were promised"})
        self.hub.store(self.body, large=True)
        return self.answer(200)

    def commit(self, kinds, repo_id, revision):
        repository = self.writable(kinds, repo_id)
        if repository is None:
            return None
        with self.hub.lock:
            parent, blobs = repository.at(revision)
            blobs = dict(blobs)
            for line in self.body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    blobs[value["path"]] = self.hub.store(base64.b64decode(value["content"]), large=False)
                elif entry["key"] == "lfsFile":
                    if not (self.hub.folder / value["oid"]).is_file():
                        return self.answer(422, {"error": f"the bytes of {value['path']} were never sent"})
                    blobs[value["path"]] = self.hub.store((self.hub.folder / value["oid"]).read_bytes(), large=True)
                elif entry["key"] == "deletedFile":
                    del blobs[value["path"]]
            state = repr((parent, sorted(blobs.items())))
            repository.commits.append((hashlib.sha1(state.encode()).hexdigest(), blobs))
            oid = repository.commits[-1][0]
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def tag(self, kinds, repo_id, revision):
        repository = self.writable(kinds, repo_id)
        if repository is None:
            return None
        name = json.loads(self.body)["tag"]
        if name in repository.tags:
            return self.answer(409, {"error": "the tag exists"})
        if repository.at(revision) is None:
            return self.missing("RevisionNotFound")
        repository.tags[name] = repository.at(revision)[0]
        return self.answer(200)

    # ---- look and download

    def info(self, kinds, repo_id, revision=None):
        repository = self.repository(KINDS[kinds], repo_id)
        if repository is None:
            return self.missing("RepoNotFound")
        found = repository.at(revision or "main")
        if found is None:
            return self.missing("RevisionNotFound")
        facts = {"id": repo_id, "sha": found[0], "private": repository.private, "tags": [], "downloads": 0, "likes": 0}
        return self.answer(200, facts | {"siblings": [{"rfilename": path} for path in found[1]]})

    def tree(self, kinds, repo_id, revision, folder=None):
        repository = self.repository(KINDS[kinds], repo_id)
        found = repository and repository.at(revision)
        if not found:
            return self.missing("RepoNotFound" if repository is None else "RevisionNotFound")
        inside = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for path, blob in found[1].items():
            below = path.removeprefix(inside).split("/")
            if path.startswith(inside):
                depth = len(below) if recursive else 2
                folders |= {inside + "/".join(below[:i]) for i in range(1, min(depth, len(below)))}
                entries += [entry_of(path, blob)] if recursive or len(below) == 1 else []
        if folder and not entries and not folders:
            return self.missing("EntryNotFound")
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        return self.answer(200, entries)

    def paths_info(self, kinds, repo_id, revision):
        repository = self.repository(KINDS[kinds], repo_id)
        if repository is None:
            return self.missing("RepoNotFound")
        _, blobs = repository.at(revision)
        form = parse_qs(self.body.decode())
        return self.answer(200, [entry_of(path, blobs[path]) for path in form.get("paths", []) if path in blobs])

    def resolve(self, kinds, repo_id, revision, path):
        repository = self.repository(KINDS[kinds or "models"], repo_id)
        if repository is None:
            return self.missing("RepoNotFound")
        found = repository.at(revision)
        if found is None:
            return self.missing("RevisionNotFound")
        commit, blobs = found
        if path not in blobs:
            code = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.answer(404, {"error": "Entry not found"}, code)
        blob = blobs[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.git}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": blob.size}
            return self.answer(302, b"", headers | {"Location": f"{self.hub.cdn}/{blob.sha256}"})
        return self.send_bytes((self.hub.folder / blob.sha256).read_bytes(), headers)

    def cdn(self, sha256):
        return self.send_bytes((self.hub.folder / sha256).read_bytes(), {"ETag": f'"{sha256}"'})

    def send_bytes(self, content: bytes, headers: dict):
        if self.action == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.action == "shorten":
            content = content[: len(content) // 2]
        if self.action == "break off" and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted or self.command == "HEAD":
            return self.answer(200, content, headers | ({"Content-Length": len(content)}))
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        part = content[first : last + 1]
        span = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return self.answer(206, part, headers | {"Content-Range": span})


def entry_of(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.git}
    lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return entry | ({"lfs": lfs} if blob.large else {})


API = r"/api/(?P<kinds>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
FILE = r"/(?:(?P<kinds>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"
SLUG = r"/api/collections/(?P<slug>[^/]+/[^/]+)"
LOOK, GET, POST = ("GET", "HEAD"), ("GET",), ("POST",)
ROUTES = [
    ("/api/whoami-v2", GET, Handler.whoami),
    ("/api/validate-yaml", POST, Handler.validate),
    ("/api/repos/create", POST, Handler.create),
    ("/api/collections", POST, Handler.make_collection),
    (SLUG, GET, Handler.collection),
    (SLUG + "/items", POST, Handler.add_item),
    (API + r"/preupload/(?P<revision>[^/]+)", POST, Handler.preupload),
    (API + r"/commit/(?P<revision>[^/]+)", POST, Handler.commit),
    (API + r"/tag/(?P<revision>[^/]+)", POST, Handler.tag),
    (API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", GET, Handler.tree),
    (API + r"/paths-info/(?P<revision>[^/]+)", POST, Handler.paths_info),
    (API + r"(?:/revision/(?P<revision>[^/]+))?", GET, Handler.info),
    (FILE + r"\.git/info/lfs/objects/batch", POST, Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", ("PUT",), Handler.lfs_put),
    (FILE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", LOOK, Handler.resolve),
    (r"/cdn/(?P<sha256>[0-9a-f]{64})", LOOK, Handler.cdn),
]
