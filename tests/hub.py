"""A small Hub on this machine, which speaks what the client of huggingface_hub needs.

    with Hub() as hub:
        ...  # programs with the environment hub.environment(folder) upload to it and download

Models are created, small files committed inline and large ones through LFS (Xet is switched off);
then they are listed and downloaded by branch or commit. Only loopback, only in memory.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

USER, TOKEN = "reader", "hf_of_the_reader"
LARGE = 20_000  # bytes: larger files go through LFS


class File(NamedTuple):
    """A file of a commit."""

    content: bytes
    is_large: bool

    @property
    def oid(self):
        """The name that git or LFS gives to the content."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def described(self, path):
        """Its entry in a list of files."""
        entry = {"oid": self.oid, "size": len(self.content)}
        large = {"lfs": {**entry, "pointerSize": 100}} if self.is_large else {}
        return {"type": "file", "path": path, **entry, **large}


class Repository:
    """The commits of a model, oldest first: each a name and all its files."""

    def __init__(self, private):
        self.private, self.commits = private, []
        self.commit({".gitattributes": File(b"", False)})

    def commit(self, files):
        names = repr([len(self.commits), *((path, file.oid) for path, file in files.items())])
        self.commits.append((hashlib.sha1(names.encode()).hexdigest(), files))

    def at(self, revision):
        """The commit of that name, or the last on the main branch."""
        named = {"main": self.commits[-1], **{commit[0]: commit for commit in self.commits}}
        return named.get(revision)


class Refusal(Exception):
    """A status, and the code by which the client knows what it means."""


class Handler(BaseHTTPRequestHandler):
    """Requests, by method and path."""

    protocol_version = "HTTP/1.1"

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        # Datasets are stored like models, and asked for by the same words behind another.
        path = path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        self.server.hub.requests.append((path, body))
        method = "GET" if self.command == "HEAD" else self.command
        matches = ((re.fullmatch(route, f"{method} {path}"), answer) for route, answer in ROUTES)
        found, answer = next(match for match in matches if match[0])
        try:
            answer(self, body, **{k: v for k, v in found.groupdict().items() if v is not None})
        except Refusal as refusal:
            status, code = refusal.args
            self.answer(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def knows_user(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name, writing=False):
        found = self.server.hub.repositories.get(name)
        if found is None or ((writing or found.private) and not self.knows_user):
            raise Refusal(404 if found is None else 401, "RepoNotFound")
        return found

    # Who and what

    def whoami(self, body):
        if not self.knows_user:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        asked, hub = json.loads(body), self.server.hub
        if not self.knows_user:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if asked.get("organization") not in (None, USER):
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        name = f"{USER}/{asked['name']}"
        is_new = name not in hub.repositories
        if is_new:
            hub.repositories[name] = Repository(asked.get("visibility") == "private")
        self.answer({"url": f"{hub.endpoint}/{name}", "name": name}, 200 if is_new else 409)

    # Upload

    def validate_card(self, body):
        self.answer({"errors": [], "warnings": []})

    def choose_mode(self, body, name, revision):
        self.repository(name, writing=True)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def begin_large(self, body, name):
        self.repository(name, writing=True)
        objects, hub = json.loads(body)["objects"], self.server.hub
        for each in objects:
            if each["oid"] not in hub.large:
                each["actions"] = {"upload": {"href": f"{hub.endpoint}/large/{each['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def put_large(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content is not that of its name")
        self.server.hub.large[oid] = body
        self.answer(b"")

    def commit(self, body, name, revision):
        repository, hub = self.repository(name, writing=True), self.server.hub
        files = dict(repository.commits[-1][1])
        for line in body.splitlines():
            kind, value = json.loads(line).values()
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                files[value["path"]] = File(hub.large[value["oid"]], True)
            elif kind == "deletedFile":
                del files[value["path"]]
        repository.commit(files)
        oid = repository.commits[-1][0]
        url = f"{hub.endpoint}/{name}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url})

    # Download

    def find(self, name, revision):
        commit = self.repository(name).at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        return commit

    def describe(self, body, name, revision="main"):
        repository, (oid, files) = self.repository(name), self.find(name, revision)
        siblings = [{"rfilename": path} for path in files]
        described = {"id": name, "sha": oid, "private": repository.private, "siblings": siblings}
        self.answer(described)

    def list_files(self, body, name, revision, folder=""):
        _, files = self.find(name, revision)
        listed = [file.described(path) for path, file in files.items() if path.startswith(folder)]
        if not listed:
            raise Refusal(404, "EntryNotFound")
        self.answer(listed)

    def download(self, body, name, revision, path):
        oid, files = self.find(name, revision)
        if path not in files:
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        file = files[path]
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": len(file.content)}
        etag = linked if file.is_large else {"ETag": f'"{file.oid}"'}
        self.answer(file.content, headers={"X-Repo-Commit": oid, **etag})

    def refuse(self, body):
        raise Refusal(404, "this small Hub does not know that request")


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_card),
    (rf"POST /api/models/{NAME}/preupload/{REVISION}", Handler.choose_mode),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.begin_large),
    (r"PUT /large/(?P<oid>\w+)", Handler.put_large),
    (rf"POST /api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (rf"GET /api/models/{NAME}(/revision/{REVISION})?", Handler.describe),
    (rf"GET /api/models/{NAME}/tree/{REVISION}(/(?P<folder>.+))?", Handler.list_files),
    (rf"GET /{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.download),
    (r".*", Handler.refuse),
]


class Hub:
    """What is stored, and what was asked."""

    def __init__(self):
        self.repositories, self.large, self.requests = {}, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """The variables of a program whose Hub this is, and which knows of no other."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, name):
        """The files of a model as they are now."""
        return self.repositories[name].commits[-1][1]
