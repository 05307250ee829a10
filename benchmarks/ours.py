"""The only file that talks to ModularBase: what a benchmark needs of its Python API."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modularbase import Engine

N_VOCAB = 49152  # of the default base
FIRST_TEXT_TOKEN = 256  # below are the control tokens of the default base's vocabulary
DEFAULT_BASE = "smollm2-135m"

# How far the engine's own decode rate may be from the one that the caller's clock gives.
CLOCK_TOLERANCE = 0.10


class MeasurementError(RuntimeError):
    """A measurement of ModularBase did not measure what it should have."""


def random_tokens(n_tokens: int, seed: int) -> list[int]:
    """Returns token ids as llama-bench's prompts have them: uniform, no text."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_TEXT_TOKEN, N_VOCAB) for _ in range(n_tokens)]


def installed_base() -> Path:
    """Returns the path of the default base, installing it where it is missing."""
    from modularbase.bases import install

    return install.resolve(DEFAULT_BASE, install=True)


@dataclass(frozen=True)
class Generation:
    """Timings of one request."""

    token_ids: list[int]
    ttft_ms: float
    prefill_tps: float
    decode_tps: float
    n_cached: int


@dataclass(frozen=True)
class Span:
    """When a request of a batch produced its first and its last token, in seconds."""

    first_s: float
    last_s: float
    n_decoded: int


def summarised(n_tokens: int) -> tuple[bytes, list[tuple[int, int, int]]]:
    """A plan: first tokens exact, spans of which each 16 tokens have a slot, last tokens exact.

    Returns:
        A tier for each token but the last ones; spans by first token, tokens and slots.
    """
    n_first, n_span, n_last = 64, 256, 128
    n_spans = max(0, n_tokens - n_first - n_last) // n_span
    spans = [(n_first + i * n_span, n_span, n_span // 16) for i in range(n_spans)]
    codes = bytes(n_first) + b"\2" * (n_spans * n_span)
    return codes + b"\1" * (n_tokens - n_last - len(codes)), spans


def aggregate_decode_tps(spans: Sequence[Span]) -> float:
    """Returns the tokens per second from the first token of any request to the last of all.

    The first token of a request comes from its prompt and is not counted.
    """
    seconds = max(span.last_s for span in spans) - min(span.first_s for span in spans)
    return sum(span.n_decoded for span in spans) / seconds


def check_clock(decode_tps: float, wall_tps: float) -> None:
    """Compares the engine's decode rate with the caller's clock.

    Raises:
        MeasurementError: They differ by more than the tolerance, so one of them is wrong.
    """
    if abs(decode_tps - wall_tps) > CLOCK_TOLERANCE * wall_tps:
        raise MeasurementError(
            f"decode_tps: expected about {wall_tps:.1f} by the caller's clock, "
            f"found {decode_tps:.1f}"
        )


class Session:
    """An engine that is loaded when it is first measured."""

    def __init__(self, path: Path, dtype: str, n_threads: int, n_ctx: int, **options: str) -> None:
        """Keeps what to load; `options` are fields of EngineOptions."""
        self._path = path
        self._load: dict[str, Any] = {"dtype": dtype, "n_threads": n_threads, "n_ctx": n_ctx}
        self._options: dict[str, Any] = dict(options)
        self._engine: Engine | None = None
        self._kept: dict[tuple[int, ...], int] = {}  # conversations by what they know

    def engine(self) -> Engine:
        """Returns the engine, loaded and warm."""
        if self._engine is None:
            from modularbase import Engine, EngineOptions

            options = EngineOptions(**self._options)
            self._engine = Engine.load(self._path, options=options, **self._load)
            self._engine.generate([1, 2, 3], max_tokens=8, temperature=0, ignore_eos=True)
        return self._engine

    def close(self) -> None:
        """Closes the engine if it was loaded."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            self._kept.clear()

    def generate(self, prompt: Sequence[int], n_gen: int, n_draft: int = 0) -> Generation:
        """Generates `n_gen` tokens greedily, past any end of text."""
        engine = self.engine()
        start = time.monotonic()
        result = engine.generate(
            list(prompt), max_tokens=n_gen, temperature=0, ignore_eos=True, n_draft=n_draft
        )
        seconds = time.monotonic() - start
        timings = result.timings
        if n_gen >= 32:  # shorter runs say little about the clock
            check_clock(timings.decode_tps, (n_gen - 1) / (seconds - timings.ttft_ms / 1e3))
        return Generation(
            token_ids=list(result.token_ids),
            ttft_ms=timings.ttft_ms,
            prefill_tps=timings.prefill_tps,
            decode_tps=timings.decode_tps,
            n_cached=result.usage.cached_tokens,
        )

    def decode_tps(self, prompt: Sequence[int], n_gen: int) -> float:
        """Returns the decode rate of `n_gen` steps behind a prompt."""
        return self.generate(prompt, n_gen + 1).decode_tps  # the first token is the prompt's

    def decode_tps_kept(self, prompt: Sequence[int], n_gen: int) -> float:
        """As `decode_tps`, behind a prompt that a conversation keeps from call to call.

        With kv="tiered" all of it but its ends is summarised first.
        """
        engine = self.engine()
        known = tuple(prompt)
        if known not in self._kept:
            self._kept[known] = engine._core.open_conversation()
            self._turn(known, 1)
            if self._options["kv"] == "tiered":
                codes, spans = summarised(len(known))
                engine._core.compact(self._kept[known], codes, spans, float("inf"))
        return self._turn(known, n_gen + 1)

    def _turn(self, known: tuple[int, ...], n_gen: int) -> float:
        from modularbase.conversation_host import Turn
        from modularbase.types import SamplingParams

        params = SamplingParams(max_tokens=n_gen, temperature=0, ignore_eos=True)
        turn = Turn(known, b"", [], self._kept[known], params, None)
        return self.engine()._submit_turn(turn).result().timings.decode_tps

    def prefill_tps(self, prompt: Sequence[int]) -> float:
        """Returns the rate at which a prompt that is not cached is processed."""
        result = self.generate(prompt, 1)
        if result.n_cached:
            raise MeasurementError(f"prefill: expected no cached tokens, found {result.n_cached}")
        return result.prefill_tps

    def together(self, prompts: Sequence[Sequence[int]], n_gen: int) -> tuple[list[Span], float]:
        """Submits all prompts at once; returns each request's span and the whole time.

        Each request decodes `n_gen` tokens after the one that its prompt gives.
        """
        engine = self.engine()
        start = time.monotonic()
        handles = [
            engine.submit(list(p), max_tokens=n_gen + 1, temperature=0, ignore_eos=True)
            for p in prompts
        ]
        results = [handle.result() for handle in handles]
        seconds = time.monotonic() - start
        spans = []
        for result in results:
            first_s = result.timings.ttft_ms / 1e3
            spans.append(Span(first_s, first_s + result.timings.decode_ms / 1e3, n_gen))
        return spans, seconds


@contextmanager
def session(
    path: Path, dtype: str, n_threads: int, n_ctx: int = 8192, **options: str
) -> Iterator[Session]:
    """Keeps an engine for the length of a block."""
    held = Session(path, dtype, n_threads, n_ctx, **options)
    try:
        yield held
    finally:
        held.close()


FIRST_TOKEN_PROGRAM = """
import sys
from modularbase import Engine
path, dtype, n_threads, n_ctx, prompt, n_gen = sys.argv[1:]
with Engine.load(path, dtype=dtype, n_threads=int(n_threads), n_ctx=int(n_ctx)) as engine:
    for piece in engine.stream(prompt, max_tokens=int(n_gen), temperature=0, ignore_eos=True):
        sys.stdout.write(piece)
        sys.stdout.flush()
"""
