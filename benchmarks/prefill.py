"""A prompt of 512 tokens: same type on both sides, and ours on its default type."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import ours
from benchmarks.harness import Case, Measure
from benchmarks.peers.llama_cpp import FLASH_ATTENTION
from benchmarks.suite import Settings, Suite

N_PROMPT = 512
N_REPEATS = 3
TARGETS = {"F16": {"keep": 1.3, "auto": 2.0}, "BF16": {"keep": 1.8}, "shipped": {}}
MICRO_BATCHES = ("512", "128")


def _peer(settings: Settings, model: Path) -> dict[str, Measure]:
    return {
        f"fa {flash} ub {rows}": partial(
            settings.peer.prefill_tps, model, N_PROMPT, N_REPEATS, {"-fa": flash, "-ub": rows}
        )
        for flash in FLASH_ATTENTION
        for rows in MICRO_BATCHES
    }


def _ours(session: ours.Session, seeds: Iterator[int]) -> float:
    return statistics.median(
        session.prefill_tps(ours.random_tokens(N_PROMPT, next(seeds))) for _ in range(N_REPEATS)
    )


def _case(settings: Settings, file: str, model: Path, dtypes: Sequence[str]) -> Iterator[Case]:
    seeds = itertools.count(1)  # a new prompt each time: none is known to the prefix cache
    sessions = {dtype: ours.Session(model, dtype, settings.n_threads, 2048) for dtype in dtypes}
    yield Case(
        name=f"prefill {N_PROMPT} {file}",
        unit="tokens/s",
        baseline=_peer(settings, model),
        contenders={label: partial(_ours, held, seeds) for label, held in sessions.items()},
        targets=TARGETS[file],
        facts={"file": file},
    )
    for session in sessions.values():
        session.close()


def cases(settings: Settings) -> Iterator[Case]:
    """Yields the F16 file (as it is, and converted at load), the BF16 and the shipped file."""
    yield from _case(settings, "F16", settings.models.f16, ("keep", "auto"))
    yield from _case(settings, "BF16", settings.models.bf16, ("keep",))
    yield from _case(settings, "shipped", settings.models.shipped, ("keep",))


SUITE = Suite("prefill", "prompt of 512 tokens", cases)
