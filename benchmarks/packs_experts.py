"""What a pack's experts cost: two of eight for a token against all eight, in the kernels alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from benchmarks.harness import Case
from benchmarks.models import read_geometry
from benchmarks.pack_files import N_SITES, pack_file
from benchmarks.programs import ensure_program, measure
from benchmarks.suite import Settings, Suite
from modularbase import Engine
from modularbase.packs.manifest import ExpertType

N_EXPERTS = 8
N_USED = 2
N_STEPS = 40
TARGET = 1 / 0.30
EXPERT_TYPES: tuple[ExpertType, ...] = ("q4_0", "q4_k", "q8_0")

Part = Literal["experts", "site"]


@dataclass(frozen=True)
class Rows:
    """The rows of a step, and how many packs they use."""

    label: str
    n_rows: int
    n_packs: int
    has_target: bool


ROWS = (
    Rows("1 row", 1, 1, has_target=True),
    Rows("8 rows, 8 packs", 8, 8, has_target=True),
    # Eight rows that choose two of the same eight experts leave hardly one out.
    Rows("8 rows, one pack", 8, 1, has_target=False),
)


@dataclass(frozen=True)
class Bench:
    """The program, and what is the same in all its runs."""

    program: Path
    n_threads: int
    bytes_between: int  # what the base reads between two sites

    def us_per_site(self, part: Part, pack: Path, rows: Rows, n_used: int) -> float:
        """Returns the time of a site, or of its experts alone."""
        numbers = (n_used, rows.n_rows, rows.n_packs, self.n_threads, N_STEPS, self.bytes_between)
        return measure(self.program, [part, str(pack), *map(str, numbers)])


def make_case(bench: Bench, part: Part, pack: Path, label: str, rows: Rows) -> Case:
    """Compares both numbers of experts; `label` says what pack it is."""
    run = partial(bench.us_per_site, part, pack, rows)
    used = f"top-{N_USED}"
    return Case(
        name=f"{'experts alone' if part == 'experts' else 'whole site'}, {label}, {rows.label}",
        unit="us a site",
        better="lower",
        baseline={f"all {N_EXPERTS}": partial(run, N_EXPERTS)},
        contenders={used: partial(run, N_USED)},
        targets={used: TARGET} if part == "experts" and rows.has_target else {},
        facts={"MB read between two sites": bench.bytes_between / 1e6},
    )


def cases(settings: Settings) -> Iterator[Case]:
    """Yields the experts of both geometries and all small types, and whole sites of INT4."""
    model = settings.models.f16
    between = read_geometry(model).weight_bytes // N_SITES
    bench = Bench(ensure_program("pack_bench"), settings.n_threads, between)
    with closing(Engine.load(model, n_threads=settings.n_threads)) as engine:
        files = {
            (size, experts): pack_file(engine, 0, size, experts)[1]
            for size in ("S", "M")
            for experts in EXPERT_TYPES
        }
    for (size, experts), pack in files.items():
        for rows in ROWS:
            yield make_case(bench, "experts", pack, f"{size} {experts}", rows)
            if experts == "q4_0":
                yield make_case(bench, "site", pack, f"{size} {experts}", rows)


SUITE = Suite("packs_experts", "Two of eight experts against all eight", cases)
