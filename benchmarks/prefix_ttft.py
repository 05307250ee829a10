"""Time to first token when the first 1,024 tokens of the prompt are known from before."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from benchmarks import ours
from benchmarks.harness import Case, Measure
from benchmarks.peers.llama_cpp import FLASH_ATTENTION
from benchmarks.peers.process import PeerRunError
from benchmarks.peers.server import Completion, Server, serve
from benchmarks.suite import Settings, Suite

N_PREFIX = 1024
N_QUESTION = 32
N_REPEATS = 5
N_CTX = 4096
LEAST_CACHED = N_PREFIX - 64  # a cache may keep whole blocks only
TARGET = 1.0

Prompts = Callable[[], list[int]]


def _server_clock(answer: Completion) -> float:
    return answer.prompt_ms


def _client_clock(answer: Completion) -> float:
    return answer.first_token_ms


def _peer(server: Server, prompts: Prompts, clock: Callable[[Completion], float]) -> float:
    values = []
    for _ in range(N_REPEATS):
        answer = server.complete(prompts(), 2)
        if answer.n_cached < LEAST_CACHED:
            raise PeerRunError(f"llama-server: only {answer.n_cached} tokens came from its cache")
        values.append(clock(answer))
    return statistics.median(values)


def _ours(session: ours.Session, prompts: Prompts, prefix: list[int]) -> float:
    session.generate(prefix, 1)
    values = []
    for _ in range(N_REPEATS):
        result = session.generate(prompts(), 2)
        if result.n_cached < LEAST_CACHED:
            raise ours.MeasurementError(
                f"prefix: only {result.n_cached} tokens came from the cache"
            )
        values.append(result.ttft_ms)
    return statistics.median(values)


def cases(settings: Settings) -> Iterator[Case]:
    """Yields the same prompt again, and a new question after the same prefix."""
    model, n_threads = settings.models.f16, settings.n_threads
    prefix = ours.random_tokens(N_PREFIX, seed=7)
    seeds = itertools.count(100)

    def again() -> list[int]:
        return prefix

    def question() -> list[int]:
        return prefix + ours.random_tokens(N_QUESTION, next(seeds))

    with ExitStack() as stack:
        servers = {
            f"fa {flash}": stack.enter_context(
                serve(settings.peer.tools, model, n_threads, N_CTX, ["-fa", flash])
            )
            for flash in FLASH_ATTENTION
        }
        for server in servers.values():
            server.complete(prefix, 2)
        sessions = {
            dtype: stack.enter_context(ours.session(model, dtype, n_threads, N_CTX))
            for dtype in ("keep", "auto")
        }
        for name, prompts in (("same prompt", again), (f"{N_QUESTION} new tokens", question)):
            baseline: dict[str, Measure] = {}
            for label, server in servers.items():
                baseline[f"{label}, its own clock"] = partial(_peer, server, prompts, _server_clock)
                baseline[f"{label}, over HTTP"] = partial(_peer, server, prompts, _client_clock)
            yield Case(
                name=f"first token, {N_PREFIX} known, {name}",
                unit="ms",
                better="lower",
                baseline=baseline,
                contenders={
                    label: partial(_ours, held, prompts, prefix) for label, held in sessions.items()
                },
                targets={"keep": TARGET},
            )


SUITE = Suite("prefix_ttft", "time to first token on a known prefix", cases)
