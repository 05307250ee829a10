"""A web server on this machine with the files of a folder, which can misbehave as real ones do."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class WebState:
    """What the server has and how it behaves; tests change it while it runs."""

    folder: Path
    n_cuts: int = 0  # how many responses end in the middle
    status: int | None = None  # answered to everything instead of the file
    tells_size: bool = True
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    address: str = ""


def _handler(state: WebState) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._respond()

        def do_GET(self) -> None:
            self._respond()

        def _respond(self) -> None:
            asked = self.headers.get("Range")
            state.requests.append((self.command, self.path, asked))
            path = state.folder / urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")
            if state.status is not None or not path.is_file():
                self.send_error(state.status or 404)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            body = path.read_bytes()[start:]
            self.send_response(206 if asked else 200)
            if state.tells_size:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                if state.n_cuts:
                    state.n_cuts -= 1
                    body = body[: len(body) // 2]
                self.wfile.write(body)
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serving(folder: Path) -> Iterator[WebState]:
    """Runs the server on a free port."""
    state = WebState(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
