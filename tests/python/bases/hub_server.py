"""A local server shaped like the Hugging Face hub, which can misbehave as real ones do."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubState:
    """What the server has and how it behaves; tests change it while it runs."""

    files: dict[str, bytes] = field(default_factory=dict)  # "<repo>/<filename>" -> content
    sha256: dict[str, str] = field(default_factory=dict)  # announced instead of the true one
    cut_after: int | None = None  # bytes of a response after which the connection is closed
    n_cuts: int = 0  # how many responses are cut; -1 is all
    status: int | None = None  # answered to every GET instead of the file
    ignores_ranges: bool = False
    extra: bytes = b""  # sent after the file
    ranges: list[str | None] = field(default_factory=list)  # Range header of every GET
    endpoint: str = ""


def _handler(state: HubState) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._respond(with_body=False)

        def do_GET(self) -> None:
            state.ranges.append(self.headers.get("Range"))
            if state.status is not None:
                self.send_error(state.status)
                return
            self._respond(with_body=True)

        def _respond(self, *, with_body: bool) -> None:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            _, _, filename = rest.partition("/")
            key = f"{repo}/{filename}"
            content = state.files.get(key)
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = 0
            asked = self.headers.get("Range")
            if asked and not state.ignores_ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content) > 0:
                self.send_error(416)
                return
            body = content[start:] + state.extra
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-/{len(content)}")
            digest = state.sha256.get(key, hashlib.sha256(content).hexdigest())
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Linked-ETag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self._send(body)

        def _send(self, body: bytes) -> None:
            if state.cut_after is not None and state.n_cuts != 0:
                state.n_cuts -= 1
                body = body[: state.cut_after]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def running_hub() -> Iterator[HubState]:
    """Runs the server on a free port of this machine."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
