"""The Hugging Face hub's API on 127.0.0.1, from folders: what huggingface_hub, datasets and transformers ask of it.

As on huggingface.co, small files answer behind a redirect to /api/resolve-cache and large ones behind a redirect to
another host, and a repository that is not there answers 401.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = {".safetensors", ".parquet", ".jsonl"}
"""Endings of files that the hub keeps in LFS."""


@dataclass
class Hub:
    """A running server of the repositories `root/models/org/name/REVISION/` and `root/datasets/…`."""

    root: Path
    endpoint: str
    requests: list[str] = field(default_factory=list)
    """`METHOD path status [range]` of every answer."""
    answering: threading.Event = field(default_factory=threading.Event)
    """While it is not set, the contents of large files have to wait."""


class HubError(Exception):
    """(status, X-Error-Code, X-Error-Message)"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            match parts:
                case ["api", "resolve-cache", kind, org, name, commit, *file]:
                    path = self._revision(kind, f"{org}/{name}", commit).joinpath(*file)
                    self._send_file(path, {"ETag": etag(path), "X-Repo-Commit": commit})
                case ["api", kind, org, name, "revision", revision]:
                    folder = self._revision(kind, f"{org}/{name}", revision)
                    siblings = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
                    self._send_json(200, {"id": f"{org}/{name}", "sha": commit_of(folder), "siblings": siblings})
                case ["api", kind, org, name, "tree", revision, *inside]:
                    folder = self._revision(kind, f"{org}/{name}", revision)
                    if not (base := folder.joinpath(*inside)).is_dir():
                        raise HubError(404, "EntryNotFound", f"{base.relative_to(folder)} does not exist")
                    found = base.rglob("*") if "recursive=true" in url.query.lower() else base.glob("*")
                    self._send_json(200, [entry(path, folder) for path in sorted(found)])
                case ["datasets", org, name, "resolve", revision, *file]:
                    self._resolve("datasets", f"{org}/{name}", revision, file)
                case [org, name, "resolve", revision, *file]:
                    self._resolve("models", f"{org}/{name}", revision, file)
                case ["cdn", digest]:
                    self.hub.answering.wait()
                    files = (path for path in self.hub.root.rglob("*") if path.suffix in LARGE)
                    self._send_file(next(path for path in files if etag(path) == f'"{digest}"'), {})
                case _:
                    raise HubError(404, "NotFound", "Sorry, we can't find the page you are looking for.")
        except HubError as failure:
            status, code, message = failure.args
            self._send_json(status, {"error": message}, **{"X-Error-Code": code, "X-Error-Message": message})

    do_HEAD = do_GET  # noqa: N815

    def _resolve(self, kind: str, repo: str, revision: str, file: list[str]) -> None:
        folder = self._revision(kind, repo, revision)
        if not (path := folder.joinpath(*file)).is_file():
            raise HubError(404, "EntryNotFound", "Entry not found")
        location = f"/api/resolve-cache/{kind}/{repo}/{commit_of(folder)}/{'/'.join(file)}"
        if path.suffix in LARGE:
            location = self.hub.endpoint.replace("127.0.0.1", "localhost") + f"/cdn/{etag(path)[1:-1]}"
        linked = {"X-Linked-ETag": etag(path), "X-Linked-Size": str(path.stat().st_size)}
        headers = {"X-Repo-Commit": commit_of(folder), "Location": location, **linked}
        self._send(302 if path.suffix in LARGE else 307, b"", headers)

    def _revision(self, kind: str, repo: str, revision: str) -> Path:
        """The folder of a branch, tag or commit."""
        if not (folders := sorted((self.hub.root / kind / repo).glob("*"))):
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        for folder in folders:
            if revision in (folder.name, commit_of(folder)):
                return folder
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        content, wanted = path.read_bytes(), self.headers.get("Range", "")
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first or 0) : int(last or len(content)) + 1]
        ranges = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"} if wanted else {}
        self._send(206 if wanted else 200, part, {"Accept-Ranges": "bytes", **ranges, **headers})

    def _send_json(self, status: int, value: Any, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {status} {self.headers.get('Range', '')}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):
            self.wfile.write(b"" if self.command == "HEAD" else content)

    def log_message(self, *_: object) -> None:
        pass


def etag(path: Path) -> str:
    content = path.read_bytes()
    in_git = hashlib.sha1(b"blob %d\0" % len(content) + content)
    return f'"{(hashlib.sha256(content) if path.suffix in LARGE else in_git).hexdigest()}"'


def commit_of(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha1("".join(f"{path.relative_to(folder)}{etag(path)}" for path in files).encode()).hexdigest()


def entry(path: Path, folder: Path) -> dict[str, Any]:
    name, size = path.relative_to(folder).as_posix(), path.stat().st_size
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    lfs = {"lfs": {"oid": etag(path)[1:-1], "size": size, "pointerSize": 134}} if path.suffix in LARGE else {}
    return {"type": "file", "oid": etag(path)[1:41], "size": size, "path": name, **lfs}


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    handler = type("BoundHandler", (Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.hub = hub = Hub(root, f"http://127.0.0.1:{server.server_address[1]}")
        hub.answering.set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.answering.set()
            server.shutdown()
