"""llama-server as a child process, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.process import PeerRunError

START_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Completion:
    """One answer of the server, with its own timings and ours."""

    first_token_ms: float  # as a client on this machine sees it
    prompt_ms: float  # as the server counts it
    n_cached: int
    decode_tps: float
    n_generated: int
    n_drafted: int
    n_accepted: int


def read_events(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a stream of server-sent events."""
    for line in lines:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise PeerRunError(f"llama-server: {event['error']}")
            yield event


def read_completion(events: Iterator[dict[str, Any]], start: float) -> Completion:
    """Reads a streamed completion to its end.

    Raises:
        PeerRunError: The stream ended without timings.
    """
    first_token_ms = 0.0
    timings: Mapping[str, Any] = {}
    for number, event in enumerate(events):
        if number == 0:
            first_token_ms = (time.monotonic() - start) * 1e3
        timings = event.get("timings", timings)
    if "predicted_per_second" not in timings:
        raise PeerRunError("llama-server: the answer ended without timings")
    return Completion(
        first_token_ms=first_token_ms,
        prompt_ms=float(timings["prompt_ms"]),
        n_cached=int(timings["cache_n"]),
        decode_tps=float(timings["predicted_per_second"]),
        n_generated=int(timings["predicted_n"]),
        n_drafted=int(timings.get("draft_n", 0)),
        n_accepted=int(timings.get("draft_n_accepted", 0)),
    )


def read_answer(answer: Mapping[str, Any], n_prompt: int, n_gen: int) -> list[int]:
    """Returns the tokens of an answer that is all that was asked for.

    Raises:
        PeerRunError: It has another number of tokens, or part of its prompt was not computed.
    """
    tokens = [int(token) for token in answer.get("tokens", [])]
    timings = answer.get("timings", {})
    if len(tokens) != n_gen or timings.get("prompt_n") != n_prompt:
        raise PeerRunError(
            f"llama-server: expected {n_prompt} tokens computed and {n_gen} generated, "
            f"found {timings.get('prompt_n')} and {len(tokens)}"
        )
    return tokens


@dataclass(frozen=True)
class Server:
    """A running llama-server."""

    port: int

    def complete(self, prompt: Sequence[int] | str, n_gen: int) -> Completion:
        """Generates `n_gen` tokens greedily, with the prompt cache on."""
        body = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": n_gen,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": True,
        }
        with self._post("/completion", body) as (response, start):
            return read_completion(read_events(iter(response.readline, b"")), start)

    def answer(self, prompt: Sequence[int], n_gen: int, adapter: int | None) -> list[int]:
        """Generates `n_gen` tokens greedily with one LoRA adapter or none; nothing is cached.

        The answer comes in one piece: reading many token by token would take CPU time from the
        server.
        """
        body = {
            "prompt": list(prompt),
            "n_predict": n_gen,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": [{"id": adapter or 0, "scale": 0.0 if adapter is None else 1.0}],
        }
        with self._post("/completion", body) as (response, _):
            return read_answer(json.loads(response.read()), len(prompt), n_gen)

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, its special tokens recognised."""
        body = {"content": text, "add_special": False, "parse_special": True}
        with self._post("/tokenize", body) as (response, _):
            return [int(token) for token in json.loads(response.read())["tokens"]]

    @contextmanager
    def _post(
        self, path: str, body: Mapping[str, object]
    ) -> Iterator[tuple[http.client.HTTPResponse, float]]:
        """Yields the answer to a request, and when the request was sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT_S)
        try:
            start = time.monotonic()
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            if response.status != 200:
                raise PeerRunError(f"llama-server: {response.status} {response.read(300)!r}")
            yield response, start
        finally:
            connection.close()

    def is_ready(self) -> bool:
        """Says whether the model is loaded."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    tools: Path,
    model: Path,
    n_threads: int,
    n_ctx: int,
    options: Sequence[str] = (),
    n_slots: int = 1,
) -> Iterator[Server]:
    """Runs llama-server until the block ends; its slots share the context.

    Raises:
        PeerRunError: The server ended before it was ready, or did not become ready.
    """
    port = _free_port()
    command = [str(tools / "llama-server"), "-m", str(model), "-t", str(n_threads)]
    command += ["-tb", str(n_threads), "-c", str(n_ctx), "-np", str(n_slots), "--no-ui"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            server = Server(port)
            deadline = time.monotonic() + START_TIMEOUT_S
            while not server.is_ready():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-1000:]
                    raise PeerRunError(f"{' '.join(command)}: not ready\n{tail}")
                time.sleep(0.05)
            yield server
        finally:
            process.terminate()
            process.wait()
