"""Eight sequences decoded at once: the rate of the decode steps, and of the whole job."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import byte_model, ours
from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.models import read_geometry
from benchmarks.peers.llama_cpp import FLASH_ATTENTION, BatchedRates
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

N_SEQUENCES = 8
N_PROMPT = 128
N_GEN = 48
TARGET = 2.0


def _decode_rate(rates: BatchedRates) -> float:
    return rates.decode_tps


def _job_rate(rates: BatchedRates) -> float:
    return rates.generated_per_s


def _peer(
    settings: Settings, model: Path, pick: Callable[[BatchedRates], float]
) -> dict[str, Measure]:
    def measure(options: dict[str, str]) -> float:
        return pick(settings.peer.batched(model, N_SEQUENCES, N_PROMPT, N_GEN, options))

    options = {
        f"fa {flash}{' unified kv' if unified else ''}": {
            "-fa": flash,
            **({"--kv-unified": ""} if unified else {}),
        }
        for flash in FLASH_ATTENTION
        for unified in (False, True)
    }
    return {label: partial(measure, chosen) for label, chosen in options.items()}


class Batch:
    """Fresh prompts for every measurement, so that no prompt is known from an earlier one."""

    def __init__(self, session: ours.Session) -> None:
        """Measures `session`."""
        self._session = session
        self._seeds = itertools.count(1)

    def _prompts(self) -> list[list[int]]:
        return [ours.random_tokens(N_PROMPT, next(self._seeds)) for _ in range(N_SEQUENCES)]

    def decode_tps(self) -> float:
        """Returns the aggregate rate of the decode steps, the prompts being cached."""
        prompts = self._prompts()
        self._session.together(prompts, N_GEN)
        spans, _ = self._session.together(prompts, N_GEN)
        return ours.aggregate_decode_tps(spans)

    def generated_per_s(self) -> float:
        """Returns generated tokens over the whole time, the prompts' included."""
        _, seconds = self._session.together(self._prompts(), N_GEN)
        return N_SEQUENCES * N_GEN / seconds


def _cases_of(settings: Settings, file: str, model: Path, dtypes: Sequence[str]) -> Iterator[Case]:
    sessions = {dtype: ours.Session(model, dtype, settings.n_threads, 2048) for dtype in dtypes}
    batches = {dtype: Batch(session) for dtype, session in sessions.items()}
    facts: dict[str, float | str] = {"file": file, "depth": N_PROMPT}
    yield Case(
        name=f"8 sequences {file}, decode",
        unit="tokens/s",
        baseline=_peer(settings, model, _decode_rate),
        contenders={dtype: batch.decode_tps for dtype, batch in batches.items()},
        targets={"keep": TARGET},
        facts=facts,
    )
    yield Case(
        name=f"8 sequences {file}, prompts and decode",
        unit="generated tokens/s",
        baseline=_peer(settings, model, _job_rate),
        contenders={dtype: batch.generated_per_s for dtype, batch in batches.items()},
        facts=facts,
    )
    for session in sessions.values():
        session.close()


def cases(settings: Settings) -> Iterator[Case]:
    """Yields the F16 and the BF16 file."""
    yield from _cases_of(settings, "F16", settings.models.f16, ("keep", "auto"))
    yield from _cases_of(settings, "BF16", settings.models.bf16, ("keep",))


def tables(settings: Settings, results: Sequence[CaseResult], machine: Machine) -> list[Table]:
    """Adds the time of a step beside the time in which memory can deliver its bytes."""
    sizes = {
        "F16": read_geometry(settings.models.f16),
        "BF16": read_geometry(settings.models.bf16),
    }
    rows = []
    steps = [result for result in results if result.name.endswith(", decode")]
    for rate in byte_model.collect_rates(steps, N_GEN):
        limit = byte_model.limit_tps(
            sizes[rate.file], rate.depth, machine.bandwidth_bytes_per_s, N_SEQUENCES
        )
        step_ms, limit_ms = (1e3 * N_SEQUENCES / r for r in (rate.tokens_per_s, limit))
        rows.append([rate.file, rate.label, f"{step_ms:.1f}", f"{limit_ms:.1f}"])
    header = ["file", "side", "ms per step of 8", "memory limit, ms"]
    return [Table("Time of a step", header, rows)]


SUITE = Suite("decode_batch", "8 sequences at once", cases, tables)
