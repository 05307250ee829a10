"""Which KV heads a summary loses most of: each keeps details alone, then the best ones together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.context.documents import LongText
from benchmarks.context.engine_systems import DetailHeads, EngineSystem, Keeping
from benchmarks.context.metrics import differences, fidelity
from benchmarks.harness import Report
from benchmarks.report import Table
from modularbase.types import FloatArray

TOGETHER = (5, 10, 15, 20)
_RATIO = 16  # tokens a slot of the other heads


@dataclass(frozen=True)
class DetailOutcome:
    """A context that is nearly all summary, where some heads keep details.

    Attributes:
        heads: Those, as (layer, head).
        compression: Bytes of the exact contexts over its own.
        kl: Mean KL divergence to the exact contexts, in nats.
        perplexity_change: Relative.
    """

    heads: DetailHeads
    compression: float
    kl: float
    perplexity_change: float


class DetailSearch:
    """Texts, and what is read behind them exactly."""

    def __init__(
        self, base: Path, texts: Sequence[LongText], n_prefix: int, n_threads: int, report: Report
    ) -> None:
        """Reads what follows the first n_prefix tokens of each text."""
        self._base, self._n_threads, self._report = base, n_threads, report
        self._parts = [(text.ids[:n_prefix], text.ids[n_prefix:]) for text in texts]
        exact = EngineSystem(base, Keeping("exact", "f16"), n_threads)
        info = exact.engine.info
        self._n_layer, self._n_head_kv = info["n_layer"], info["n_head_kv"]
        self._references, self._exact_bytes = self._read(exact)

    def run(self) -> Iterator[DetailOutcome]:
        """Yields the outcome without details, of each head alone, and of the best together."""
        heads = [(layer, head) for layer in range(self._n_layer) for head in range(self._n_head_kv)]
        yield self._measure(())
        alone = [self._measure((head,)) for head in heads]
        yield from alone
        best = [outcome.heads[0] for outcome in sorted(alone, key=lambda outcome: outcome.kl)]
        for n in TOGETHER:
            yield self._measure(tuple(best[:n]))

    def _measure(self, heads: DetailHeads) -> DetailOutcome:
        keeping = Keeping("details", "tiered", _RATIO, heads)
        logits, n_bytes = self._read(EngineSystem(self._base, keeping, self._n_threads))
        found = fidelity(
            [
                differences(reference, other, rest)
                for reference, other, (_, rest) in zip(
                    self._references, logits, self._parts, strict=True
                )
            ]
        )
        outcome = DetailOutcome(
            heads, self._exact_bytes / n_bytes, found.kl.value, found.perplexity_change.value
        )
        self._report(f"details of {len(heads)} heads, last {heads[-1:]}: KL {outcome.kl:.5f}")
        return outcome

    def _read(self, system: EngineSystem) -> tuple[list[FloatArray], int]:
        """What follows each text, and the bytes of all; closes the engine."""
        with system.engine:
            held = [system.hold(prefix) for prefix, _ in self._parts]
            logits = [
                context.logits(rest) for context, (_, rest) in zip(held, self._parts, strict=True)
            ]
        return logits, sum(context.n_bytes for context in held)


def detail_table(outcomes: Sequence[DetailOutcome], title: str) -> Table:
    """The heads whose details help most when they are the only ones, and the best together."""
    none, *others = outcomes
    alone = sorted((o for o in others if len(o.heads) == 1), key=lambda outcome: outcome.kl)
    shown = [none, *alone[: max(TOGETHER)], *(o for o in others if len(o.heads) > 1)]
    rows = [
        [
            _named(outcome.heads),
            f"{outcome.compression:.2f}x",
            f"{outcome.kl:.5f}",
            f"{none.kl - outcome.kl:+.5f}",
            f"{100 * outcome.perplexity_change:+.2f}",
        ]
        for outcome in shown
    ]
    header = ["details of (layer, head)", "compression", "KL to F16", "gained", "perplexity, %"]
    return Table(title, header, rows)


def _named(heads: DetailHeads) -> str:
    if not heads:
        return "none"
    if len(heads) == 1:
        return f"{heads[0]}"
    return f"the best {len(heads)}"
