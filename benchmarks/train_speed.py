"""Steps of a training run, plain and with states that an engine computed before.

What the plain step does more is the base's lower half, and the upper half without the pack on
neutral blocks. The engine's pass over the text is timed apart, so that the ratio of whole runs
follows for every number of passes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.harness import Case, CaseResult
from benchmarks.machine import Machine
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

PASSES = (1, 2, 4, 8, 16)
TARGET = 1.6
STEP = "training step, 8 x 256 tokens, geometry S"
PASS = "engine's pass over the text, with its start"


def cases(settings: Settings) -> Iterator[Case]:
    """Yields the step of both runs, and the engine's pass."""
    from benchmarks.train_runs import FROM_ENGINE, PLAIN, Runs  # slow to import: torch

    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(settings.models.shipped, settings.n_threads, Path(folder))
        yield Case(
            name=STEP,
            unit="tokens/s",
            baseline={PLAIN: partial(runs.step_tps, PLAIN)},
            contenders={FROM_ENGINE: partial(runs.step_tps, FROM_ENGINE)},
            targets={FROM_ENGINE: TARGET},
        )
        yield Case(PASS, "tokens/s", baseline={}, contenders={FROM_ENGINE: runs.pass_tps})


def tables(_: Settings, results: Sequence[CaseResult], __: Machine) -> list[Table]:
    """Adds the ratio of whole runs."""
    by_name = {result.name: result for result in results}
    if any(not by_name[name].contenders for name in (STEP, PASS)):
        return []
    (plain,) = by_name[STEP].baseline.values()
    (step,) = by_name[STEP].contenders.values()
    (engine,) = by_name[PASS].contenders.values()
    rows = []
    for n_passes in PASSES:
        seconds = n_passes / step.value.median + 1 / engine.value.median  # for each token of text
        rows.append([str(n_passes), f"{n_passes / plain.median / seconds:.2f}"])
    title = "Whole runs, the engine's pass included (from the medians)"
    return [Table(title, ["passes over the text", "ratio to the plain run"], rows)]


SUITE = Suite("train_speed", "training with states from an engine", cases, tables)
