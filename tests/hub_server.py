"""A small local stand-in for the Hugging Face Hub, for tests that must not touch the network.

`HubServer` serves, on 127.0.0.1 and from memory, the part of the Hub's HTTP protocol that a training script needs:
who-am-i, repository creation, uploads of regular and Git LFS files as commits, listings and downloads. The real
`huggingface_hub` client talks to it in a process whose environment comes from `client_env`:

    with HubServer() as server:
        subprocess.run([sys.executable, "train.py", "--push_to_hub"], env=client_env(server, tmp_path), check=True)
        assert "README.md" in server.files("tester/my-model")

There are only model repositories, only the branch `main` (and commits, by their full id), no pull requests, no Xet
storage and no redirects. Anything else is answered with status 501, which the client does not retry, so that a missing
feature shows up as an error and not as a wrong answer.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
LFS_SIZE = 10 * 1024 * 1024  # any file above this size goes to LFS, whatever its suffix
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
CLIENT_VARIABLES = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
YAML_LINE = re.compile(r"\s*|\s*#.*| .*|-( .*)?|[^\s:][^:]*:( .*)?")


def card_errors(block):
    """What the Hub would say of a card's metadata, by its documents on model cards and widgets, and by modelcard.md of
    hub-docs (read 2026-11-29)."""
    import yaml

    try:
        data = yaml.safe_load(block) or {}
    except yaml.YAMLError as error:
        return [str(error).replace("\n", " ")]
    name = r"[\w.-]+(/[\w.-]+)?"
    bases = data.get("base_model", [])
    widget, index = data.get("widget", []), data.get("model-index", [])
    rules = {
        "license": re.fullmatch(r"[a-z0-9.-]+", data.get("license", "other")),
        "license_name": data.get("license") == "other" or "license_name" not in data,
        "base_model": all(re.fullmatch(name, base) for base in ([bases] if isinstance(bases, str) else bases)),
        "base_model_relation": data.get("base_model_relation", "finetune")
        in ("adapter", "finetune", "merge", "quantized"),
        "tags": all(isinstance(tag, str) for tag in data.get("tags", [])),
        "pipeline_tag": data.get("pipeline_tag", "text-to-image") == "text-to-image",  # the only one here
        "library_name": isinstance(data.get("library_name", ""), str),
        "widget": all(
            isinstance(example.get("text"), str)
            and isinstance(example.get("output", {}), dict)
            and all(isinstance(value, str) for value in example.get("output", {}).values())
            for example in widget
        ),
        "inference": isinstance(data.get("inference", True), bool)
        or isinstance(data["inference"].get("parameters"), dict),
        "model-index": all(
            isinstance(model.get("name"), str)
            and all(
                isinstance(result.get("task", {}).get("type"), str)
                and all(isinstance(result.get("dataset", {}).get(key), str) for key in ("type", "name"))
                and result.get("metrics")
                and all(isinstance(row.get("type"), str) and "value" in row for row in result["metrics"])
                for result in model.get("results", [{}])
            )
            for model in index
        ),
    }
    return [f"{key}: not valid" for key, is_valid in rules.items() if not is_valid]


class HubError(Exception):
    """An answer other than success. From `code`, sent as `X-Error-Code`, the client picks the exception to raise."""

    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.body = {"error": message, **body}


@dataclass
class Call:
    """One request: its query, its body, whether it carried the server's token; and the headers of the answer."""

    query: dict
    body: bytes
    authorized: bool
    headers: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    """One version of a file."""

    data: bytes
    lfs: bool

    @property
    def etag(self):
        """The id by which the client recognises unchanged files: sha256 for LFS files, else git's id of a blob."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A repository: its history as (commit id, files by path), oldest first, and the LFS objects by their sha256."""

    repo_id: str
    private: bool
    history: list = field(default_factory=list)
    objects: dict = field(default_factory=dict)

    def commit(self, files):
        """Append a commit that holds exactly `files`; returns its id."""
        listing = [self.repo_id, len(self.history), sorted((path, blob.etag) for path, blob in files.items())]
        oid = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.history.append((oid, files))
        return oid

    def at(self, revision):
        """The commit id and the files of `main` or of a commit."""
        if revision == "main":
            return self.history[-1]
        for oid, files in self.history:
            if oid == revision:
                return oid, files
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class HubServer:
    """The server: a context manager, which listens while it is entered.

    `url` is its address, for `HF_ENDPOINT`. `token` is the only token it accepts, that of the user `tester`.
    `requests` is the list of (method, path) in the order of arrival; queries, headers and bodies are not kept.
    """

    user = "tester"

    def __init__(self):
        self.token = f"hf_test_{secrets.token_hex(12)}"
        self.requests = []
        self._repos = {}
        self._uploads = {}  # LFS uploads that were announced: ticket -> (repository, sha256)
        self._failures = []  # from `fail_next`: [how many are left, status, part of the path]
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.respond = self._respond
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def files(self, repo_id):
        """Content by path at the last commit. Like the Hub's, a new repository has a `.gitattributes`."""
        return {path: blob.data for path, blob in self._repos[repo_id].history[-1][1].items()}

    def private(self, repo_id):
        """Whether the repository is private."""
        return self._repos[repo_id].private

    def fail_next(self, n, status=503, path_contains=""):
        """Answer the next `n` requests whose path contains `path_contains` with `status`, and do nothing for them."""
        with self._lock:
            self._failures.append([n, status, path_contains])

    def _respond(self, method, target, authorization, body):
        """Answer one request: (status, headers, a JSON value or bytes)."""
        url = urlsplit(target)
        call = Call(parse_qs(url.query), body, authorized=authorization == f"Bearer {self.token}")
        with self._lock:
            self.requests.append((method, unquote(url.path)))
            try:
                self._inject_failure(unquote(url.path))
                if authorization and not call.authorized:
                    raise HubError(401, "Invalid credentials in Authorization header")  # the client knows this text
                for route, pattern, endpoint in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and route == ("GET" if method == "HEAD" else method):
                        return 200, call.headers, endpoint(self, call, *map(unquote, match.groups()))
                raise HubError(501, f"Not implemented by the test server: {method} {unquote(url.path)}")
            except HubError as error:
                return error.status, call.headers | error.headers, error.body

    def _inject_failure(self, path):
        for failure in self._failures:
            if failure[0] > 0 and failure[2] in path:
                failure[0] -= 1
                raise HubError(failure[1], "Failure injected by the test")

    def _repo(self, call, repo_id, write=False):
        """Find a repository. As on the Hub, one that the caller may not see is reported like one that is missing."""
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and not call.authorized):
            raise HubError(404 if call.authorized else 401, "Repository not found", "RepoNotFound")
        if write:
            self._require_token(call)
        return repo

    def _require_token(self, call):
        if not call.authorized:
            raise HubError(401, "Invalid username or password.")

    # The endpoints; `ROUTES`, below the class, has their addresses. Each returns a JSON value or bytes.

    def _whoami(self, call):
        self._require_token(call)
        return {"type": "user", "name": self.user, "fullname": self.user, "orgs": []}

    def _create_repo(self, call):
        """Create a repository. For one that exists the client reads its address from the error, if `exist_ok`."""
        self._require_token(call)
        payload = json.loads(call.body)
        if payload.get("type", "model") != "model":
            raise HubError(501, "The test server has model repositories only")
        if (payload.get("organization") or self.user) != self.user:
            raise HubError(403, f"You don't have the rights to create a model under {payload['organization']!r}")
        repo_id = f"{self.user}/{payload['name']}"
        url = f"{self.url}/{repo_id}"
        if repo_id in self._repos:
            raise HubError(409, "You already created this model repo", url=url)
        private = payload.get("visibility") == "private" or payload.get("private", False)  # the latter from 0.x
        self._repos[repo_id] = Repo(repo_id, private=private)
        self._repos[repo_id].commit({".gitattributes": Blob(GIT_ATTRIBUTES, lfs=False)})
        return {"url": url, "name": repo_id}

    def _validate_yaml(self, call):
        """Check a model card's metadata block: there, closed, at the top level `key: value` lines or a list, with
        values of the kinds that the Hub's documents name."""
        lines = json.loads(call.body)["content"].splitlines()
        if lines[:1] != ["---"]:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        if "---" not in lines[1:]:
            bad = ["the metadata block is not closed by '---'"]
        else:
            block = lines[1 : lines.index("---", 1)]
            bad = [line for line in block if not YAML_LINE.fullmatch(line)] or card_errors("\n".join(block))
        if bad:
            raise HubError(400, "Invalid YAML", errors=[{"message": message} for message in bad], warnings=[])
        return {"errors": [], "warnings": []}

    def _info(self, call, repo_id, revision="main"):
        repo = self._repo(call, repo_id)
        oid, files = repo.at(revision)
        about = {"id": repo_id, "modelId": repo_id, "author": self.user, "sha": oid, "private": repo.private}
        siblings = [{"rfilename": path, "size": len(blob.data)} for path, blob in sorted(files.items())]
        return {**about, "gated": False, "disabled": False, "tags": [], "siblings": siblings}

    def _tree(self, call, repo_id, revision):
        if call.query.get("recursive") not in (["true"], ["True"]):  # the client of 0.x writes the latter
            raise HubError(501, "The test server lists trees recursively only")
        entries = []
        for path, blob in sorted(self._repo(call, repo_id).at(revision)[1].items()):
            entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.etag}
            if blob.lfs:  # on the Hub, the entry's "oid" is then that of the small pointer file that git keeps
                entry["lfs"] = {"oid": blob.etag, "size": len(blob.data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _preupload(self, call, repo_id, revision):
        """Say for each file how to upload it, and the id of its present content, so that the client can skip it."""
        files = self._repo(call, repo_id, write=True).at(revision)[1]
        answers = []
        for file in json.loads(call.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in files:
                answer["oid"] = files[file["path"]].etag
            answers.append(answer)
        return {"files": answers}

    def _lfs_batch(self, call, repo_id):
        """Hand out upload addresses, which like the Hub's need no token. Objects that are already here get none."""
        repo = self._repo(call, repo_id, write=True)
        objects = json.loads(call.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.objects:
                ticket = secrets.token_hex(8)
                self._uploads[ticket] = repo, item["oid"]
                item["actions"] = {"upload": {"href": f"{self.url}/upload/{ticket}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, call, ticket):
        repo, oid = self._uploads.get(ticket, (None, None))
        if oid != hashlib.sha256(call.body).hexdigest():
            raise HubError(403, "Unknown upload address, or not the content that was announced for it")
        repo.objects[oid] = call.body
        return b""

    def _commit(self, call, repo_id, revision):
        """Apply a commit: one JSON object per line, a header and then the operations."""
        repo = self._repo(call, repo_id, write=True)
        head, files = repo.at(revision)
        if revision != "main" or "create_pr" in call.query:
            raise HubError(501, "The test server commits to main only")
        files = dict(files)
        for line in call.body.splitlines():
            key, value = json.loads(line).values()
            path = value.get("path", "")
            if key == "header" and value.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = Blob(repo.objects[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = {name: blob for name, blob in files.items() if name not in gone}
        oid = repo.commit(files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"}

    def _resolve(self, call, repo_id, revision, path):
        """A file's content. For a missing file too the client wants the commit, to remember that it is missing."""
        call.headers["X-Repo-Commit"], files = self._repo(call, repo_id).at(revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        call.headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            call.headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        return blob.data


ROUTES = (
    ("GET", r"/api/whoami-v2", HubServer._whoami),
    ("POST", r"/api/repos/create", HubServer._create_repo),
    ("POST", r"/api/validate-yaml", HubServer._validate_yaml),
    ("GET", r"/api/models/([^/]+/[^/]+)", HubServer._info),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", HubServer._info),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", HubServer._tree),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", HubServer._preupload),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", HubServer._commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", HubServer._lfs_batch),
    ("PUT", r"/upload/([^/]+)", HubServer._lfs_upload),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", HubServer._resolve),
)


class _Handler(BaseHTTPRequestHandler):
    """Carries requests to the server's `respond`. Connections are kept alive, hence each body is read to its end."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, answer = self.server.respond(self.command, self.path, self.headers.get("Authorization"), body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *args):
        """Print nothing; tests read `HubServer.requests`."""


def client_env(server, home):
    """Environment for a process whose `huggingface_hub` shall use `server`, with its caches under `home`.

    The client reads these variables when it is imported, hence a process of its own. Inherited settings of the client
    (tokens, cache folders, offline mode) are left out, and no proxy stands between it and the server.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_VARIABLES)}
    env |= {"HF_ENDPOINT": server.url, "HF_TOKEN": server.token, "HF_HOME": str(home)}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return env | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
