"""Needles: whether a system's context still gives a value that it was told once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.context.metrics import mean_nll
from benchmarks.context.needles import Haystack
from benchmarks.context.systems import ContextSystem, HeldContext, TierName
from benchmarks.harness import Report
from modularbase.bases.tokenizer import Tokenizer


@dataclass(frozen=True)
class RecallOutcome:
    """One system on one haystack.

    Attributes:
        system: Its name.
        kind: Of needle.
        depth: Of the needle.
        tier: Where the caller said that needles belong; None: the system heeds no tiers.
        is_found: Whether greedy decoding gives the answer.
        answer_nll: Of the answer, in nats a token.
        compression: Bytes of the first system's context over its own.
    """

    system: str
    kind: str
    depth: float
    tier: TierName | None
    is_found: bool
    answer_nll: float
    compression: float


def measure_recall(
    systems: Sequence[ContextSystem],
    haystacks: Iterable[Haystack],
    tokenizer: Tokenizer,
    report: Report,
) -> list[RecallOutcome]:
    """Asks each system for each needle, in each tier where it heeds them."""
    found = list[RecallOutcome]()
    for haystack in haystacks:
        exact_bytes: int | None = None
        for system, tier in _cases(systems):
            ids, tiers = tokens_of(haystack.in_tier(tier) if tier else haystack, tokenizer)
            held = system.hold(ids, tiers)
            exact_bytes = exact_bytes or held.n_bytes
            given, nll = _answer(held, haystack, tokenizer)
            is_found = given.strip() == haystack.answer
            compression = exact_bytes / held.n_bytes
            found.append(
                RecallOutcome(
                    system.name, haystack.kind, haystack.depth, tier, is_found, nll, compression
                )
            )
            report(f"{haystack.kind} at {haystack.depth:g}: {system.name}: {given!r} ({nll:.3f})")
    return found


def tokens_of(haystack: Haystack, tokenizer: Tokenizer) -> tuple[list[int], list[TierName]]:
    """Tokens of a haystack, each with its segment's tier."""
    empty = tokenizer.encode("")
    ids = empty[:1] if tokenizer.bos_id in empty else []
    tiers: list[TierName] = ["key"] * len(ids)
    for segment in haystack.segments:
        part = tokenizer.encode_plain(segment.text)
        ids += part
        tiers += [segment.tier] * len(part)
    return ids, tiers


def _cases(
    systems: Sequence[ContextSystem],
) -> Iterator[tuple[ContextSystem, TierName | None]]:
    for system in systems:
        for tier in system.heeded_tiers or (None,):
            yield system, tier


def _answer(held: HeldContext, haystack: Haystack, tokenizer: Tokenizer) -> tuple[str, float]:
    """What is generated, and the right answer's loss."""
    question = tokenizer.encode_plain(haystack.question)
    answer = tokenizer.encode_plain(f" {haystack.answer}")
    given = tokenizer.decode_continuation(held.generate(question, len(answer)))
    read = [*question, *answer]
    n_before = len(question) - 1  # this row tells the answer's first token
    return given, mean_nll(held.logits(read)[n_before:], read[n_before:])
