"""A local server that speaks the routes of the Hugging Face Hub that this library uses:
metadata and ranges of files, which it serves from another host name like the Hub's CDN,
and what an upload calls.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest


class Hub:
    """The server's content and behaviour, to be changed by a test.

    Attributes:
        files: content by path, "datasets/OWNER/NAME/FILE" or "OWNER/NAME/FILE".
        announced: sha256 and size that are announced instead of the true ones, by path.
        drops: bytes after which the connection breaks, one for each of the next
            answers.
        reset: whether it breaks with a TCP reset.
        ranges: whether ranges are honoured.
        stall: bytes after which an answer stalls, and `stalled` is set.
        requests: method, path and range of every request.
        tokens: the authorization of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.announced: dict[str, tuple[str, int]] = {}
        self.drops: list[int] = []
        self.reset = False
        self.ranges = True
        self.stall: int | None = None
        self.stalled = threading.Event()
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: list[str | None] = []
        self.url = ""

    @property
    def sent(self) -> list[tuple[str, str | None]]:
        """Path and range of the requests for content."""
        return [(path, span) for method, path, span in self.requests if path.startswith("/cdn/")]

    def commit(self, repository: str) -> str:
        content = {k: v for k, v in self.files.items() if k.startswith(repository + "/")}
        return hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client was killed
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def reply_json(self, document: object) -> None:
            self.reply(200, json.dumps(document).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            path = unquote(self.path)
            hub.requests.append((self.command, path, self.headers["Range"]))
            hub.tokens.append(self.headers["Authorization"])
            if path.startswith("/cdn/"):
                self.send_content(hub.files[path.removeprefix("/cdn/")])
            elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                self.resolve(f"{found[1]}/{found[3]}", found[1])
            elif found := re.match(r"/api/(datasets/[^/]+/[^/]+)/(revision|tree)/", path):
                self.describe(found[1], tree=found[2] == "tree")
            else:
                self.reply(404)

        do_HEAD = do_GET

        def resolve(self, file: str, repository: str) -> None:
            if file not in hub.files:
                missing = not any(name.startswith(repository + "/") for name in hub.files)
                code = "RepoNotFound" if missing else "EntryNotFound"
                self.reply(404, X_Error_Code=code, X_Repo_Commit=hub.commit(repository))
                return
            content = hub.files[file]
            sha256, size = hub.announced.get(
                file, (hashlib.sha256(content).hexdigest(), len(content))
            )
            self.reply(
                302,
                Location=hub.url.replace("127.0.0.1", "localhost") + f"/cdn/{file}",
                X_Repo_Commit=hub.commit(repository),
                X_Linked_Etag=f'"{sha256}"',
                X_Linked_Size=str(size),
            )

        def describe(self, repository: str, *, tree: bool) -> None:
            """The commit of a repository, or its files."""
            found = {
                name.removeprefix(repository + "/"): content
                for name, content in hub.files.items()
                if name.startswith(repository + "/")
            }
            if not found:
                self.reply(404, X_Error_Code="RepoNotFound")
            elif tree:
                self.reply_json(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": name}
                        for name, content in found.items()
                    ]
                )
            else:
                siblings = [{"rfilename": name} for name in found]
                name = repository.removeprefix("datasets/")
                self.reply_json({"id": name, "sha": hub.commit(repository), "siblings": siblings})

        def send_content(self, content: bytes) -> None:
            first = 0
            if span := re.fullmatch(r"bytes=(\d+)-", (hub.ranges and self.headers["Range"]) or ""):
                first = int(span[1])
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            body = content[first:]
            if hub.drops:
                self.wfile.write(body[: hub.drops.pop(0)])
                self.wfile.flush()
                if hub.reset:
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                else:
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.connection.close()
                self.close_connection = True
                return
            if hub.stall is not None:
                self.wfile.write(body[: hub.stall])
                hub.stalled.set()
                self.connection.recv(1)  # until the client is gone
                self.close_connection = True
                return
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            blocks = []
            while size := int(self.rfile.readline(), 16):
                blocks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(blocks)

        def do_POST(self) -> None:
            body = self.body()
            hub.requests.append(("POST", self.path, None))
            hub.tokens.append(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                document = json.loads(body)
                name = f"{document.get('organization') or 'me'}/{document['name']}"
                self.reply_json({"url": f"{hub.url}/{name}", "name": name})
            elif self.path == "/api/validate-yaml":
                self.reply_json({"errors": [], "warnings": []})
            elif self.path.endswith("/preupload/main"):
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                self.reply_json({"files": files})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.files[f"{found[1]}/{line['value']['path']}"] = content
                url = f"{hub.url}/{found[1]}/commit/{hub.commit(found[1])}"
                self.reply_json({"commitUrl": url, "commitOid": hub.commit(found[1])})
            else:
                self.reply(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(url: str, cache: object, patch: pytest.MonkeyPatch) -> None:
    """Make `huggingface_hub` of this process talk to `url`, with its files below `cache`."""
    from huggingface_hub import constants

    patch.setenv("XDG_CACHE_HOME", str(cache))
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", f"{cache}/hub")
    patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
