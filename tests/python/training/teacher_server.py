"""A teacher on this machine, shaped like OpenAI's, which can misbehave as real ones do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = int | bytes | None
"""A status to answer with, a body to answer with, or None: the connection is closed."""


@dataclass
class TeacherState:
    """What the teacher says and how it behaves; tests change it while it runs."""

    answer: Callable[[str], Any] = lambda prompt: f"Answer to: {prompt}"
    finish_reason: str | None = "stop"
    faults: list[Fault] = field(default_factory=list)  # of the next requests
    fault_of: Callable[[str], Fault] | None = None  # of a prompt, every time
    headers: dict[str, str] = field(default_factory=dict)  # sent with faults
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies, with "path" and "key"
    n_now: int = 0
    n_at_once: int = 0  # the most
    wait: threading.Event | None = None  # requests wait for it
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


_MISSING = object()


def _handler(state: TeacherState) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            with state.lock:
                key = self.headers.get("Authorization")
                state.requests.append({**body, "path": self.path, "key": key})
                fault = state.faults.pop(0) if state.faults else _MISSING
                state.n_now += 1
                state.n_at_once = max(state.n_at_once, state.n_now)
            if fault is _MISSING and state.fault_of:
                fault = state.fault_of(prompt) or _MISSING
            if state.wait:
                state.wait.wait(10)
            self._respond(prompt, fault)
            with state.lock:
                state.n_now -= 1

        def _respond(self, prompt: str, fault: Any) -> None:
            if fault is None:
                self.close_connection = True
                self.connection.close()
            elif isinstance(fault, int):
                self._send(fault, b'{"error": "not now"}', state.headers)
            elif isinstance(fault, bytes):
                self._send(200, fault, {})
            else:
                self._send(200, json.dumps(self._answer(prompt)).encode(), {})

        def _answer(self, prompt: str) -> dict[str, Any]:
            text = state.answer(prompt)
            is_chat = self.path.endswith("/chat/completions")
            said = {"message": {"content": text}} if is_chat else {"text": text}
            return {"choices": [{**said, "index": 0, "finish_reason": state.finish_reason}]}

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away, and of connections closed on purpose."""


@contextmanager
def running_teacher() -> Iterator[TeacherState]:
    """Runs the server on a free port of this machine."""
    state = TeacherState()
    server = _Server(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
