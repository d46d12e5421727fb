"""A stand-in for the Hugging Face hub's HTTP API: what huggingface_hub calls to upload a folder and to download it again.

Small files come inside the commit, `.safetensors` by LFS, as on the hub. Nothing is checked but the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"


class HubStandIn:
    """One hub: repositories with their last commit.

    Attributes:
        files: repository -> name of a file -> content.
        created: what was asked for at creation, repository -> payload.
        messages: of the commits.
        asked: method and path of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict[str, Any]] = {}
        self.messages: list[str] = []
        self.asked: list[str] = []
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serves on a free port of this machine and gives the endpoint."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self.url
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def commit_of(self, repo: str) -> str:
        names = json.dumps({name: hashlib.sha256(c).hexdigest() for name, c in sorted(self.files[repo].items())})
        return hashlib.sha1(names.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers["authorization"] == f"Bearer {TOKEN}"
            self._json(
                {"type": "user", "name": "me"} if known else {"error": "Invalid user token."}, 200 if known else 401
            )
        elif path.startswith("/api/models/"):
            self._repository(*path.removeprefix("/api/models/").split("/")[:3])
        else:
            self._file(path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        path = self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            self.hub.created[repo] = asked
            self.hub.files.setdefault(repo, {})
            self._json({"url": f"{self.hub.url}/{repo}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith(".safetensors") else "regular") for name in files]
            self._json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False, "oid": None} for n, m in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}}
                for one in objects
            ]
            self._json({"transfer": "basic", "objects": actions})
        elif "commit" in parts:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": f"not part of the stand-in: {path}"}, 404)

    def do_PUT(self) -> None:
        self.hub.objects[self.path.removeprefix("/lfs/")] = self.rfile.read(int(self.headers["content-length"]))
        self._json({})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit_of(repo)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _repository(self, owner: str, name: str, kind: str = "") -> None:
        repo = f"{owner}/{name}"
        if repo not in self.hub.files:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif kind == "tree":
            files = self.hub.files[repo].items()
            self._json(
                [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
            )
        else:
            siblings = [{"rfilename": name} for name in self.hub.files[repo]]
            self._json(
                {"id": repo, "sha": self.hub.commit_of(repo), "siblings": siblings, "private": False, "tags": []}
            )

    def _file(self, path: str) -> None:
        owner, name, *_ = parts = path.strip("/").split("/")  # OWNER/NAME/resolve/REVISION/FILE
        repo = f"{owner}/{name}"
        content = self.hub.files.get(repo, {}).get("/".join(parts[4:]))
        if content is None:
            self._json({"error": f"not part of the stand-in: {path}"}, 404)
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit_of(repo)}
        self._answer(content, 200, {**headers, "Content-Type": "application/octet-stream"})

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
