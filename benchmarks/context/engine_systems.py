"""The engine's ways to keep a context, each in an engine of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.context.systems import TierName
from modularbase import Engine, EngineOptions, _core
from modularbase.errors import BaseLoadError
from modularbase.gguf_file import read_matrix
from modularbase.types import FloatArray, KvKind

SINK_TOKENS, WINDOW_TOKENS, SPAN_TOKENS = 16, 128, 256
CODES: dict[TierName, int] = {"key": 0, "important": 1, "redundant": 2}


@dataclass(frozen=True)
class Keeping:
    """How an engine keeps a context.

    Attributes:
        name: As tables have it.
        kv: Of the engine.
        ratio: Tokens a slot; 0: nothing is summarised.
        detail_layers: None takes the catalogue's.
    """

    name: str
    kv: KvKind
    ratio: int = 0
    detail_layers: tuple[int, ...] | None = None


KEEPINGS = (
    Keeping("ours, Q8_0", "q8_0"),
    Keeping("ours, important", "tiered"),
    Keeping("ours, redundant 16:1 but for the ends", "tiered", 16),
    Keeping("ours, the same without detail layers", "tiered", 16, ()),
)


class EngineSystem:
    """An engine; what it holds is a conversation."""

    heeds_tiers = False

    def __init__(self, base: Path, keeping: Keeping, n_threads: int) -> None:
        """Loads the base."""
        self.name = keeping.name
        self._keeping = keeping
        options = EngineOptions(
            pack_budget_bytes=0, prefix_cache="off", kv_detail_layers=keeping.detail_layers
        )
        self.engine = Engine.load(
            base, dtype="keep", n_threads=n_threads, kv=keeping.kv, options=options
        )
        self.head = _head(base)  # [n_vocab, n_embd]

    def hold(self, ids: Sequence[int], tiers: Sequence[TierName] | None = None) -> EngineContext:
        """Reads a context, and compacts all of it but the last tokens; see ContextSystem."""
        core = self.engine._core
        held = EngineContext(self, core.open_conversation(), tuple(ids))
        held.generate((), 1)
        if self._keeping.kv == "tiered":
            core.compact(held.number, *self._plan(len(ids), tiers), 1e9)
        state = core.context_state(held.number)
        held.n_bytes = (
            state.key_bytes + state.important_bytes + state.redundant_bytes + state.own_bytes
        )
        return held

    def _plan(self, n: int, tiers: Sequence[TierName] | None) -> tuple[bytes, list[Any]]:
        n_past = max(0, n - WINDOW_TOKENS)
        codes = bytearray([CODES["important"]]) * n_past
        codes[:SINK_TOKENS] = bytes(min(SINK_TOKENS, n_past))
        if tiers is not None:
            codes[:] = bytes(CODES[tier] for tier in tiers[:n_past])
        spans = []
        if self._keeping.ratio:
            # Behind 64 tokens of beginning, whole spans up to the window.
            for start in range(64, n_past - SPAN_TOKENS + 1, SPAN_TOKENS):
                spans.append((start, SPAN_TOKENS, SPAN_TOKENS // self._keeping.ratio))
                codes[start : start + SPAN_TOKENS] = bytes([CODES["redundant"]]) * SPAN_TOKENS
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
        spec = self._spec(ids)
        spec.kind = _core.RequestKind.hidden
        spec.layer = self.system.engine.info["n_layer"] + 1
        states = self.system.engine._finished(spec).hidden
        states = states.reshape(-1, self.system.head.shape[1])[-len(ids) :]
        found: FloatArray = states @ self.system.head.T
        return found

    def generate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """See HeldContext."""
        spec = self._spec(ids)
        spec.max_tokens = max_tokens
        spec.sampling.temperature = 0.0
        spec.stop_ids = sorted(self.system.engine.tokenizer.eog_ids)
        return [token.id for token in self.system.engine._finished(spec).tokens]

    def _spec(self, ids: Sequence[int]) -> Any:
        spec = _core.RequestSpec()
        spec.prompt = [*self.ids, *ids]
        spec.conversation = self.number
        return spec


def _head(base: Path) -> FloatArray:
    try:
        return read_matrix(base, "output.weight")
    except BaseLoadError:  # the base ties both
        return read_matrix(base, "token_embd.weight")
