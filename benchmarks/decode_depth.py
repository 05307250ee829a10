"""Batch-1 decode behind contexts of 0 to about 8,000 tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import byte_model, ours
from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.models import read_geometry
from benchmarks.peers.llama_cpp import FLASH_ATTENTION
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

N_GEN = 64
N_REPEATS = 3  # within a round, on both sides; the deep context is computed once for all
DEPTHS = (0, 1024, 4096, 8192 - 2 * N_GEN)
QUICK_DEPTHS = (0, 1024)
TARGETS = {0: 1.15, 4096: 1.8}


def _peer(settings: Settings, model: Path, depth: int) -> dict[str, Measure]:
    return {
        f"fa {flash}": partial(
            settings.peer.decode_tps, model, N_GEN, depth, N_REPEATS, {"-fa": flash}
        )
        for flash in FLASH_ATTENTION
    }


def _ours(session: ours.Session, depth: int) -> float:
    # An empty context still needs one token to start from, as the peer's does.
    prompt = ours.random_tokens(max(depth, 1), seed=depth)
    return statistics.median(session.decode_tps(prompt, N_GEN) for _ in range(N_REPEATS))


def _cases_of(
    settings: Settings, file: str, model: Path, dtypes: Sequence[str], depths: Sequence[int]
) -> Iterator[Case]:
    for depth in depths:
        contenders: dict[str, Measure] = {}
        sessions = [ours.Session(model, dtype, settings.n_threads, 8192) for dtype in dtypes]
        for dtype, session in zip(dtypes, sessions, strict=True):
            contenders[dtype] = partial(_ours, session, depth)
        target = TARGETS.get(depth)
        yield Case(
            name=f"decode {file} depth {depth}",
            unit="tokens/s",
            baseline=_peer(settings, model, depth),
            contenders=contenders,
            targets={"keep": target} if target and file != "shipped" else {},
            facts={"file": file, "depth": depth},
        )
        for session in sessions:
            session.close()


def cases(settings: Settings) -> Iterator[Case]:
    """Yields the F16 and BF16 files at every depth, and the shipped file at both ends."""
    depths = QUICK_DEPTHS if settings.quick else DEPTHS
    yield from _cases_of(settings, "F16", settings.models.f16, ("keep", "auto"), depths)
    yield from _cases_of(settings, "BF16", settings.models.bf16, ("keep",), depths)
    ends = (depths[0], 1024 if settings.quick else 4096)
    yield from _cases_of(settings, "shipped", settings.models.shipped, ("keep",), ends)


def tables(settings: Settings, results: Sequence[CaseResult], machine: Machine) -> list[Table]:
    """Adds the share of the memory limit and the cost against depth."""
    files = settings.models
    sizes = {
        "F16": read_geometry(files.f16),
        "BF16": read_geometry(files.bf16),
        "shipped": read_geometry(files.shipped),
    }
    rates = byte_model.collect_rates(results, N_GEN)
    return [byte_model.share_table(rates, sizes, machine), byte_model.depth_table(rates)]


SUITE = Suite("decode_depth", "batch-1 decode against depth", cases, tables)
