"""The engine's ways to keep a context, each in an engine of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.context.systems import TierName
from modularbase import Engine, EngineOptions, _core
from modularbase.context.similarity import similarity_to_newest
from modularbase.context.spans import Span
from modularbase.errors import BaseLoadError
from modularbase.gguf_file import read_matrix
from modularbase.types import FloatArray, KvKind

SINK_TOKENS, WINDOW_TOKENS, SPAN_TOKENS = 16, 128, 256
SENTENCES_TOKENS = 64  # as the grader joins them
MOST_REHYDRATED = 4
DetailHeads: TypeAlias = tuple[tuple[int, int], ...]
"""KV heads as (layer, head)."""
CODES: dict[TierName, int] = {"key": 0, "important": 1, "redundant": 2}


@dataclass(frozen=True)
class Keeping:
    """How an engine keeps a context.

    Attributes:
        name: As tables have it.
        kv: Of the engine.
        ratio: Tokens a slot; 0: nothing is summarised.
        detail_heads: None takes the catalogue's.
        rehydrate_above: Spans that a question resembles more are read again; None: none is.
    """

    name: str
    kv: KvKind
    ratio: int = 0
    detail_heads: DetailHeads | None = None
    rehydrate_above: float | None = None


KEEPINGS = (
    Keeping("ours, Q8_0", "q8_0"),
    Keeping("ours, important", "tiered"),
    Keeping("ours, redundant 16:1 but for the ends", "tiered", 16),
    Keeping("ours, the same without detail heads", "tiered", 16, ()),
)

TOLD_KEEPINGS: Mapping[Keeping, Sequence[TierName]] = {
    Keeping("ours, told tiers", "tiered", 16): ("key", "important", "redundant"),
    Keeping("ours, spans read again", "tiered", 16, rehydrate_above=0.35): ("redundant",),
}
"""Whose callers say the tier of each token; and where needles are put."""


class EngineSystem:
    """An engine; what it holds is a conversation."""

    def __init__(self, base: Path, keeping: Keeping, n_threads: int) -> None:
        """Loads the base."""
        self.name = keeping.name
        self.heeded_tiers = TOLD_KEEPINGS.get(keeping, ())
        self.keeping = keeping
        self.engine = load_engine(base, keeping.kv, keeping.detail_heads, n_threads)
        self.head = read_head(base)  # [n_vocab, n_embd]

    def hold(self, ids: Sequence[int], tiers: Sequence[TierName] | None = None) -> EngineContext:
        """Reads a context, and compacts all of it but the last tokens; see ContextSystem."""
        core = self.engine._core
        held = EngineContext(self, core.open_conversation(), tuple(ids))
        held.generate((), 1)
        if self.keeping.kv == "tiered":
            told = tiers if self.heeded_tiers else None
            core.compact(held.number, *self._plan(len(ids), told), 1e9)
        held.n_bytes = core.context_state(held.number).total_bytes
        return held

    def _plan(self, n: int, tiers: Sequence[TierName] | None) -> tuple[bytes, list[Any]]:
        n_past = max(0, n - WINDOW_TOKENS)
        codes = bytearray([CODES["important"]]) * n_past
        if tiers is not None:
            codes[:] = bytes(CODES[tier] for tier in tiers[:n_past])
        elif self.keeping.ratio:
            # Behind 64 tokens of beginning, whole spans up to the window.
            n_spans = max(0, n_past - 64) // SPAN_TOKENS
            codes[64 : 64 + n_spans * SPAN_TOKENS] = b"\2" * (n_spans * SPAN_TOKENS)
        codes[:SINK_TOKENS] = bytes(min(SINK_TOKENS, n_past))
        most = SPAN_TOKENS if tiers is None else SENTENCES_TOKENS
        spans = [
            (start, n_tokens, max(1, n_tokens // self.keeping.ratio))
            for start, n_tokens in redundant_spans(bytes(codes), most)
        ]
        return bytes(codes), spans


@dataclass
class EngineContext:
    """A conversation behind which the engine goes on; see HeldContext."""

    system: EngineSystem
    number: int
    ids: tuple[int, ...]
    n_bytes: int = 0

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """See HeldContext."""
        system = self.system
        return last_logits(system.engine, system.head, self.number, self.ids, ids)

    def generate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """See HeldContext."""
        spec = self._spec(ids)
        spec.max_tokens = max_tokens
        spec.sampling.temperature = 0.0
        spec.stop_ids = sorted(self.system.engine.tokenizer.eog_ids)
        spec.rehydrate = self._resembling(ids)
        return [token.id for token in self.system.engine._finished(spec).tokens]

    def _resembling(self, ids: Sequence[int]) -> list[int]:
        """Starts of the summarised spans that a question resembles, most of all the first."""
        above = self.system.keeping.rehydrate_above
        if above is None:
            return []
        kept = self.system.engine._core.context_state(self.number).spans
        places = [(start, self.ids[start : start + n], 0) for start, n, _ in kept]
        places.append((len(self.ids), tuple(ids), 1))
        spans = [
            Span(start, len(part), message, "user", "prose", self._text(part), None)
            for start, part, message in places
        ]
        found = zip(similarity_to_newest(spans)[:-1], spans, strict=False)
        best = sorted(((-value, span.start) for value, span in found if value > above))
        return [start for _, start in best[:MOST_REHYDRATED]]

    def _text(self, ids: Sequence[int]) -> str:
        return self.system.engine.tokenizer.decode_continuation(ids)

    def _spec(self, ids: Sequence[int]) -> Any:
        spec = _core.RequestSpec()
        spec.prompt = [*self.ids, *ids]
        spec.conversation = self.number
        return spec


def load_engine(base: Path, kv: KvKind, detail_heads: DetailHeads | None, n_threads: int) -> Engine:
    """An engine that computes everything it is asked, in the types of the file."""
    options = EngineOptions(pack_budget_bytes=0, prefix_cache="off", kv_detail_heads=detail_heads)
    return Engine.load(base, dtype="keep", n_threads=n_threads, kv=kv, options=options)


def redundant_spans(codes: bytes, most: int) -> list[tuple[int, int]]:
    """Runs of redundant tokens as (first, how many), none longer than `most`."""
    spans, end = list[tuple[int, int]](), 0
    for code, group in groupby(codes):
        start, end = end, end + len(list(group))
        if code == CODES["redundant"]:
            spans += [(at, min(most, end - at)) for at in range(start, end, most)]
    return spans


def last_logits(
    engine: Engine, head: FloatArray, conversation: int, before: Sequence[int], ids: Sequence[int]
) -> FloatArray:
    """Reads tokens behind those that a conversation has, which are not changed by it.

    Args:
        engine: The engine.
        head: Of the base, [n_vocab, n_embd].
        conversation: Its number.
        before: What it has.
        ids: What follows.

    Returns:
        [n_tokens, n_vocab] for what follows.
    """
    width = head.shape[1]
    other = (ids[0] + 1) % head.shape[0]
    _states(engine, conversation, [*before, other])  # so that nothing is known behind `before`
    states = _states(engine, conversation, [*before, *ids]).reshape(-1, width)[-len(ids) :]
    found: FloatArray = states @ head.T
    return found


def _states(engine: Engine, conversation: int, ids: Sequence[int]) -> FloatArray:
    spec = _core.RequestSpec()
    spec.kind = _core.RequestKind.hidden
    spec.layer = engine.info["n_layer"] + 1
    spec.prompt = list(ids)
    spec.conversation = conversation
    return engine._finished(spec).hidden


def read_head(base: Path) -> FloatArray:
    """The output head, [n_vocab, n_embd]."""
    try:
        return read_matrix(base, "output.weight")
    except BaseLoadError:  # the base ties both
        return read_matrix(base, "token_embd.weight")
