"""The parts of the benchmark: what each measures, shows and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context.cache_methods import Exact
from benchmarks.context.chat_tokens import ChatTokens
from benchmarks.context.engine_systems import KEEPINGS, EngineSystem, Keeping
from benchmarks.context.fidelity import measure_fidelity
from benchmarks.context.obedience import measure_obedience
from benchmarks.context.plots import draw_fidelity, draw_obedience
from benchmarks.context.recall import measure_recall
from benchmarks.context.settings import Settings
from benchmarks.context.systems import ContextSystem
from benchmarks.context.tables import (
    fidelity_table,
    obedience_rows,
    obedience_table,
    recall_table,
)
from benchmarks.context.torch_model import TorchModel
from benchmarks.context.torch_systems import MethodSystem
from benchmarks.harness import Report
from benchmarks.report import Table
from modularbase.gguf_file import read_metadata


class Bench:
    """What all parts share."""

    def __init__(self, base: Path, settings: Settings, *, n_threads: int, report: Report) -> None:
        """Reads the base."""
        self.base, self.settings, self.report = base, settings, report
        self.n_threads = n_threads
        self.model = TorchModel(base, n_threads=n_threads)
        self.exact: ContextSystem = MethodSystem(self.model, Exact())
        self.systems = settings.systems(self.model)


@dataclass(frozen=True)
class PartResult:
    """What a part gave.

    Attributes:
        table: For people.
        values: Every single one, for programs.
        draw: Writes a picture.
    """

    table: Table
    values: Sequence[Mapping[str, Any]]
    draw: Callable[[Path], None] | None = None


def _fidelity(bench: Bench) -> PartResult:
    settings = bench.settings
    texts = settings.texts(bench.model)
    rows = measure_fidelity(bench.exact, bench.systems, texts, settings.n_prefix, bench.report)
    title = f"{len(texts)} documents, {settings.n_read} tokens behind {settings.n_prefix}"
    values = [asdict(row) for row in rows]
    return PartResult(fidelity_table(rows, title), values, partial(draw_fidelity, rows))


def _engine(bench: Bench) -> PartResult:
    settings = bench.settings
    texts = settings.texts(bench.model)
    exact = EngineSystem(bench.base, Keeping("ours, F16", "f16"), bench.n_threads)
    systems = [EngineSystem(bench.base, keeping, bench.n_threads) for keeping in KEEPINGS]
    try:
        rows = measure_fidelity(exact, systems, texts, settings.n_prefix, bench.report)
    finally:
        for system in (exact, *systems):
            system.engine.close()
    title = (
        f"our engine: {len(texts)} documents, {settings.n_read} tokens behind {settings.n_prefix}"
    )
    return PartResult(fidelity_table(rows, title), [asdict(row) for row in rows])


def _needles(bench: Bench) -> PartResult:
    systems = [bench.exact, *bench.systems]
    tokenizer = bench.model.encoder.tokenizer
    outcomes = measure_recall(systems, bench.settings.haystacks(), tokenizer, bench.report)
    return PartResult(recall_table(outcomes), [asdict(outcome) for outcome in outcomes])


def _dialogues(bench: Bench) -> PartResult:
    systems = [bench.exact, *bench.systems]
    chat = ChatTokens(read_metadata(bench.base))
    settings = bench.settings
    outcomes = measure_obedience(
        systems, settings.dialogues(), chat, settings.n_answer, bench.report
    )
    rows = obedience_rows(outcomes)
    values = [asdict(outcome) for outcome in outcomes]
    return PartResult(obedience_table(rows), values, partial(draw_obedience, rows))


PARTS: Mapping[str, Callable[[Bench], PartResult]] = {
    "fidelity": _fidelity,
    "engine": _engine,
    "needles": _needles,
    "dialogues": _dialogues,
}
