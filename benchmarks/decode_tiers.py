"""Batch-1 decode behind a deep context that is kept in fewer bits, or mostly as a summary."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks import ours
from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

N_GEN = 64
N_REPEATS = 3
PEER_REPEATS = 1  # its deep context is computed again for each
N_CTX = 8192
DEPTHS = (4096, N_CTX - 2 * N_GEN)
QUICK_DEPTHS = (1024,)
OURS = ("q8_0", "q4_0", "tiered")
PEERS = ("f16", "q8_0", "q4_0")
TARGET_OURS = {N_CTX - 2 * N_GEN: 1.3}
TARGET_PEER = {N_CTX - 2 * N_GEN: 2.5}


def _ours(session: ours.Session, depth: int) -> float:
    prompt = ours.random_tokens(depth, seed=depth)
    return statistics.median(session.decode_tps_kept(prompt, N_GEN) for _ in range(N_REPEATS))


def _peer(settings: Settings, depth: int) -> dict[str, Measure]:
    # The peer's rounded caches need its flash attention.
    return {
        f"peer {kind}": partial(
            settings.peer.decode_tps,
            settings.models.f16,
            N_GEN,
            depth,
            PEER_REPEATS,
            {"-fa": "on", "-ctk": kind, "-ctv": kind},
        )
        for kind in PEERS
    }


def cases(settings: Settings) -> Iterator[Case]:
    """Yields each depth twice: against our own exact cache, and against the peer's best."""
    for depth in QUICK_DEPTHS if settings.quick else DEPTHS:
        sessions = {
            kind: ours.Session(settings.models.f16, "keep", settings.n_threads, N_CTX, kv=kind)
            for kind in ("f16", *OURS)
        }
        measures = {kind: partial(_ours, session, depth) for kind, session in sessions.items()}
        contenders: dict[str, Measure] = {kind: measures[kind] for kind in OURS}
        for name, baseline, target in (
            ("our f16", {"f16": measures["f16"]}, TARGET_OURS.get(depth)),
            ("the peer", _peer(settings, depth), TARGET_PEER.get(depth)),
        ):
            yield Case(
                name=f"decode F16 depth {depth}, against {name}",
                unit="tokens/s",
                baseline=baseline,
                contenders=contenders,
                targets={"q4_0": target, "tiered": target} if target else {},
                facts={"depth": depth},
            )
        for session in sessions.values():
            session.close()


def tables(settings: Settings, results: Sequence[CaseResult], machine: Machine) -> list[Table]:
    """Adds nothing to the cases."""
    return []


SUITE = Suite("decode_tiers", "decode behind a rounded context", cases, tables)
