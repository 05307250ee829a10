"""The lowest tier that structure allows each span: rules are never left to a score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, TypeAlias

from modularbase.context.chat import Section
from modularbase.context.signals import TOLD, WEAK, Signal, find_signals
from modularbase.context.spans import MERGED_TOKENS, Span, cut_spans
from modularbase.context_types import Tier

Cause: TypeAlias = Literal[
    "system prompt", "template", "rules", "content", "tool results", "the caller's tiers"
]

# The first tokens take up attention that has no other place (arXiv:2309.17453).
SINK_TOKENS = 16
# Of a rule that is kept exactly, and of what an announcement keeps so.
KEY_TOKENS = 96
# Of what a template writes around a message; more is a text of its own, as a tool's definition is.
MARK_TOKENS = 16
# Of a tool's result that is kept exactly, and of one that is plain values.
KEY_RESULT_TOKENS = 64
KEY_VALUES_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Floor:
    """The lowest tier a span may have.

    Attributes:
        tier: The tier.
        reason: Why, in words for people.
        cause: Why, in one of few words, for the account of what a budget must hold.
        is_fixed: Whether the span may have no other tier either.
    """

    tier: Tier
    reason: str
    cause: Cause
    is_fixed: bool = False


FlooredSpans: TypeAlias = Sequence[tuple[Span, Floor | None]]


@lru_cache(maxsize=16)  # a turn asks several times
def floored_spans(sections: tuple[Section, ...]) -> FlooredSpans:
    """The spans of a conversation, in order; None is the floor where a score may decide.

    Neighbours in a message that have none are one span as long as they are short together, with the
    marks around them: slots for the whole say more than as many, each for a sentence or a mark.
    """
    spans = cut_spans(sections)
    edges = {section.start for section in sections}
    found = list[tuple[Span, Floor | None]]()
    for span, floor in zip(spans, find_floors(spans), strict=True):
        if found and _belong(found[-1], (span, floor), edges):
            found[-1] = (found[-1][0].joined(span), None)
        else:
            found.append((span, floor))
    return tuple(found)


def spans_of(sections: tuple[Section, ...]) -> tuple[Span, ...]:
    """The same spans alone."""
    return tuple(span for span, _ in floored_spans(sections))


def _belong(
    one: tuple[Span, Floor | None], other: tuple[Span, Floor | None], edges: AbstractSet[int]
) -> bool:
    (first, _), (second, _) = one, other
    n_said = [span.said.n_tokens for span, floor in (one, other) if floor is None]
    are_free = all(
        floor is None or (span.kind == "control" and floor.tier is Tier.IMPORTANT)
        for span, floor in (one, other)
    )
    is_one_message = first.message_index == second.message_index
    # Text behind an edge was cut off from the text before it: by marks, or as what lay between them
    # was forgotten, when each had its tier already.
    is_one_text = second.start not in edges or "control" in (first.kind, second.kind)
    is_short = bool(n_said) and sum(n_said) <= MERGED_TOKENS
    return is_one_message and are_free and is_one_text and is_short


def find_floors(spans: Sequence[Span]) -> list[Floor | None]:
    """The floor of each span; None where its score may decide.

    Args:
        spans: Of `cut_spans`: a whole conversation, in order.
    """
    floors: list[Floor | None] = []
    for _, group in groupby(spans, lambda span: span.message_index):
        message = list(group)
        result = _result_floor([span for span in message if span.kind != "control"])
        announced = _Announcement()
        of_text = {
            span: _by_place(span) or result or _by_text(span, announced)
            for span in message
            if span.kind != "control"
        }
        is_kept = any(f and f.is_fixed and f.tier is Tier.KEY for f in of_text.values())
        floors += [
            _frame_floor(span, is_kept) if span.kind == "control" else of_text[span]
            for span in message
        ]
    return floors


def _by_place(span: Span) -> Floor | None:
    """What follows from where a span is, whatever it says."""
    if span.tier is not None:
        return Floor(span.tier, "set by the caller", "the caller's tiers", is_fixed=True)
    if span.role in ("system", "developer"):
        return Floor(Tier.KEY, f"{span.role} message", "system prompt")
    if span.start < SINK_TOKENS:
        return Floor(Tier.KEY, f"begins in the first {SINK_TOKENS} tokens", "system prompt")
    return None


def _frame_floor(span: Span, is_kept: bool) -> Floor:
    """The floor of what the template wrote: its text is a rule; marks are alike, and 4 bits do.

    Those of a message that the caller wants to be kept are a part of it.
    """
    is_text = span.n_tokens > MARK_TOKENS or span.message_index == 0
    is_key = is_text or is_kept or span.role in ("system", "developer")
    tier = Tier.KEY if is_key else Tier.IMPORTANT
    return Floor(tier, "written by the chat template", "template")


def _result_floor(message: Sequence[Span]) -> Floor | None:
    """The floor of a tool's result: its values are gone if they are not in the context."""
    if not message or message[0].role not in ("tool", "function"):
        return None
    n_tokens = sum(span.n_tokens for span in message)
    if n_tokens <= KEY_RESULT_TOKENS:
        return Floor(Tier.KEY, "short result of a tool", "tool results")
    if n_tokens <= KEY_VALUES_TOKENS and _is_plain_values("".join(s.text for s in message)):
        return Floor(Tier.KEY, "values from a tool", "tool results")
    return Floor(Tier.IMPORTANT, "result of a tool", "tool results")


def _is_plain_values(text: str) -> bool:
    """Whether a text is JSON without anything nested."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    items = value.values() if isinstance(value, Mapping) else value
    items = items if isinstance(value, (Mapping, list)) else [value]
    return not any(isinstance(item, (Mapping, list)) for item in items)


class _Announcement:
    """What "remember this" does to the rest of its message."""

    def __init__(self) -> None:
        self._words = ""
        self._n_tokens_left = 0

    def begins(self, signal: Signal) -> None:
        """The span just seen announces what follows."""
        self._words, self._n_tokens_left = signal.words, KEY_TOKENS

    def floor(self, span: Span) -> Floor | None:
        """The floor of a span that says nothing itself."""
        if not self._words:
            return None
        self._n_tokens_left -= span.n_tokens
        tier = Tier.KEY if self._n_tokens_left >= 0 else Tier.IMPORTANT
        return Floor(tier, f"announced by {self._words!r}", "rules")


def _by_text(span: Span, announced: _Announcement) -> Floor | None:
    signals = find_signals(span.text)
    exact = [signal for signal in signals if signal.kind not in TOLD]
    if span.role == "assistant":
        # It tells the user, not itself; what it said exactly must still be there to be asked for.
        reason = "code" if span.kind == "code" else _reason(exact)
        return Floor(Tier.IMPORTANT, reason, "content") if reason else None
    reason = span.kind if span.kind != "prose" else _reason(signals)
    inherited = announced.floor(span)
    for signal in signals[:1]:
        if signal.kind == "announcement":
            announced.begins(signal)
    if not reason and span.is_part:
        # What makes it a rule may stand in another part.
        return Floor(Tier.IMPORTANT, "part of an overlong sentence", "rules")
    if not reason:
        return inherited
    is_weak = span.kind == "prose" and all(signal.kind in WEAK for signal in signals)
    if is_weak and inherited:
        return inherited
    is_key = span.n_tokens <= KEY_TOKENS and not is_weak
    return Floor(Tier.KEY if is_key else Tier.IMPORTANT, reason, "rules")


def _reason(signals: Sequence[Signal]) -> str:
    return f"{signals[0].kind} {signals[0].words!r}" if signals else ""
