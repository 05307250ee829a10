"""Requests to tiny engines, and engines set up for tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modularbase import Engine, EngineOptions, Generation, Result

# Spans below 8 rows run row by row (kTileSpanRows in kernels/attention_scratch.h), in the order of
# sums that decoding has. With steps of at most 7 rows every way to schedule a request gives the
# same bits; with longer ones, the same to rounding.
BITWISE_ROWS = 7

# What rounding may do to a log-probability of a tiny F32 model. Seen: 1.3e-4 at most, where a
# key or value falls on the other side of an F16 rounding; a wrong one costs some 0.1.
ROUNDING = 2e-3
# With BF16 weights inputs are rounded to BF16 as well, 8 bits. Seen: 1.4e-2.
ROUNDING_BF16 = 5e-2


def ids(n: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids drawn at random; 257 would end a generation."""
    draw = random.Random(seed)
    return tuple(draw.randrange(256) for _ in range(n))


@dataclass(frozen=True)
class Request:
    """A generation with logprobs=2; greedy without a seed."""

    prompt: tuple[int, ...]
    n_tokens: int = 24
    seed: int | None = None
    n_draft: int = 0

    def submit(self, engine: Engine) -> Generation:
        """Queues it."""
        return engine.submit(
            self.prompt,
            max_tokens=self.n_tokens,
            temperature=0 if self.seed is None else 1.0,
            seed=self.seed,
            n_draft=self.n_draft,
            ignore_eos=True,
            logprobs=2,
        )

    def run(self, engine: Engine) -> Result:
        """Waits for it."""
        return self.submit(engine).result(60)


def load(path: Path, *, dtype: str = "keep", n_threads: int = 1, **options: Any) -> Engine:
    """An engine on one thread, so that a busy machine does not slow its tiny steps down."""
    return Engine.load(
        path,
        dtype=dtype,  # type: ignore[arg-type]
        n_threads=n_threads,
        options=EngineOptions(**options),
    )


def block_bytes(engine: Engine) -> int:
    """Bytes of one KV block, for budgets counted in blocks."""
    return int(engine.info["kv_bytes"] // engine.info["n_kv_blocks"])
