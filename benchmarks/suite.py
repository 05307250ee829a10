"""What every benchmark module is made of: its settings, its cases and its further tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness import Case, CaseResult
from benchmarks.machine import Machine
from benchmarks.models import ModelFiles
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.report import Table


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmarks was asked for."""

    models: ModelFiles
    peer: LlamaCpp
    n_threads: int
    quick: bool


Cases = Callable[[Settings], Iterator[Case]]
Tables = Callable[[Settings, Sequence[CaseResult], Machine], list[Table]]


def no_tables(_: Settings, __: Sequence[CaseResult], ___: Machine) -> list[Table]:
    """Adds nothing to the table of results."""
    return []


@dataclass(frozen=True)
class Suite:
    """One benchmark. `cases` yields a case while what it needs is open, and closes it after."""

    name: str
    about: str
    cases: Cases
    tables: Tables = no_tables
