"""The parts of the benchmark: what each measures, shows and draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context.cache_methods import Exact
from benchmarks.context.chat_tokens import ChatWriter
from benchmarks.context.compaction_share import measure_turns, share_table
from benchmarks.context.detail_heads import DetailSearch, detail_table
from benchmarks.context.dialogues import Dialogue
from benchmarks.context.engine_conversations import (
    TALK_KEEPINGS,
    ConversationSystem,
    CountingTalk,
    TalkKeeping,
    fitting_options,
)
from benchmarks.context.engine_systems import (
    KEEPINGS,
    TOLD_KEEPINGS,
    DetailHeads,
    EngineSystem,
    Keeping,
    load_engine,
    read_head,
)
from benchmarks.context.fidelity import measure_fidelity
from benchmarks.context.held_dialogues import DialogueSystem, WholeDialogues
from benchmarks.context.measured_dialogues import measure_dialogues
from benchmarks.context.plots import draw_fidelity
from benchmarks.context.recall import measure_recall
from benchmarks.context.settings import Settings
from benchmarks.context.systems import ContextSystem
from benchmarks.context.tables import (
    dialogue_rows,
    dialogue_table,
    fidelity_table,
    recall_table,
)
from benchmarks.context.torch_model import TorchModel
from benchmarks.context.torch_systems import MethodSystem
from benchmarks.harness import Report
from benchmarks.report import Table
from modularbase import Engine
from modularbase.context_types import ContextOptions
from modularbase.gguf_file import read_metadata
from modularbase.types import KvKind


class Bench:
    """What all parts share."""

    def __init__(self, base: Path, settings: Settings, *, n_threads: int, report: Report) -> None:
        """Reads the base."""
        self.base, self.settings, self.report = base, settings, report
        self.n_threads = n_threads
        self.model = TorchModel(base, n_threads=n_threads)
        self.exact: ContextSystem = MethodSystem(self.model, Exact())
        self.systems = settings.systems(self.model)
        metadata = read_metadata(base)
        self.writer = ChatWriter(metadata)
        self._n_layer = int(str(metadata[f"{metadata['general.architecture']}.block_count"]))

    def engine(self, kv: KvKind, detail_heads: DetailHeads | None) -> Engine:
        """An engine of ours; heads of layers that the base lacks are left out."""
        if detail_heads is not None:
            detail_heads = tuple(head for head in detail_heads if head[0] < self._n_layer)
        return load_engine(self.base, kv, detail_heads, self.n_threads)


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


def _fidelity(bench: Bench) -> Iterator[PartResult]:
    settings = bench.settings
    texts = settings.texts(bench.model)
    rows = measure_fidelity(bench.exact, bench.systems, texts, settings.n_prefix, bench.report)
    title = f"{len(texts)} documents, {settings.n_read} tokens behind {settings.n_prefix}"
    values = [asdict(row) for row in rows]
    yield PartResult(fidelity_table(rows, title), values, partial(draw_fidelity, rows))


def _engine(bench: Bench) -> Iterator[PartResult]:
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
    values = [asdict(row) for row in rows]
    yield PartResult(fidelity_table(rows, title), values, partial(draw_fidelity, rows))


def _detail_heads(bench: Bench) -> Iterator[PartResult]:
    settings = bench.settings
    texts, n_prefix = settings.choosing_texts(bench.model), settings.n_choosing_prefix
    search = DetailSearch(bench.base, texts, n_prefix, bench.n_threads, bench.report)
    found = list(search.run())
    title = f"{len(texts)} other documents, {settings.n_read} tokens behind {n_prefix}"
    yield PartResult(detail_table(found, title), [asdict(outcome) for outcome in found])


def _needles(bench: Bench) -> Iterator[PartResult]:
    yield from _recalled(bench, [bench.exact, *bench.systems])


def _tier_needles(bench: Bench) -> Iterator[PartResult]:
    yield from _recalled(bench, [])


def _recalled(bench: Bench, others: Sequence[ContextSystem]) -> Iterator[PartResult]:
    tokenizer = bench.model.encoder.tokenizer
    exact = EngineSystem(bench.base, Keeping("ours, F16", "f16"), bench.n_threads)
    ours = [EngineSystem(bench.base, keeping, bench.n_threads) for keeping in TOLD_KEEPINGS]
    try:
        systems = [*others, exact, *ours]
        outcomes = measure_recall(systems, bench.settings.haystacks(), tokenizer, bench.report)
    finally:
        for system in (exact, *ours):
            system.engine.close()
    yield PartResult(recall_table(outcomes), [asdict(outcome) for outcome in outcomes])


def _dialogues(bench: Bench) -> Iterator[PartResult]:
    settings = bench.settings
    yield from _talked(bench, settings.dialogues(), settings.n_probes)


def _chats(bench: Bench) -> Iterator[PartResult]:
    settings = bench.settings
    yield from _talked(bench, settings.chats(), settings.n_probes_compared)


def _talked(bench: Bench, scripts: Sequence[Dialogue], n_probes: int) -> Iterator[PartResult]:
    head = read_head(bench.base)
    with ExitStack() as engines:
        ours = [
            ConversationSystem(
                engines.enter_context(bench.engine(keeping.kv, keeping.detail_heads)), head, keeping
            )
            for keeping in TALK_KEEPINGS
        ]
        yield from _held(bench, ours, scripts, n_probes)


def _baselines(bench: Bench) -> Iterator[PartResult]:
    settings = bench.settings
    others = [WholeDialogues(system) for system in (bench.exact, *bench.systems)]
    scripts = settings.dialogues()[: settings.n_compared]
    yield from _held(bench, others, scripts, settings.n_probes_compared)


def _held(
    bench: Bench, systems: Sequence[DialogueSystem], scripts: Sequence[Dialogue], n_probes: int
) -> Iterator[PartResult]:
    """The exact system first."""
    settings = bench.settings
    for outcomes in measure_dialogues(
        systems, scripts, bench.writer, n_probes, settings.n_answer, bench.report
    ):
        rows = dialogue_rows(outcomes)
        values = [outcome.values for outcome in outcomes]
        drawn = [row.fidelity for row in rows[1:]]
        yield PartResult(dialogue_table(rows), values, partial(draw_fidelity, drawn))


def _compaction(bench: Bench) -> Iterator[PartResult]:
    settings = bench.settings
    script = settings.dialogues()[0].turns
    keeping = TalkKeeping("", ContextOptions(), ratio=4)
    with bench.engine("tiered", None) as engine:
        talk = CountingTalk(engine, fitting_options(engine, keeping, bench.writer.write(script)))
        messages = [turn.user for turn in script]
        turns = list(measure_turns(talk, messages, settings.n_answer))
        report = talk.conversation.context
    assert report is not None
    compression = report.exact_bytes / report.total_bytes
    table = share_table(turns, compression, settings.n_answer)
    yield PartResult(table, [asdict(turn) for turn in turns])


PARTS: Mapping[str, Callable[[Bench], Iterator[PartResult]]] = {
    "fidelity": _fidelity,
    "engine": _engine,
    "detail_heads": _detail_heads,
    "needles": _needles,
    "tier_needles": _tier_needles,
    "dialogues": _dialogues,
    "chats": _chats,
    "baselines": _baselines,
    "compaction": _compaction,
}
"""What each part gives; long ones tell what they have so far, the last one is all."""
