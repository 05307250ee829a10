"""What a conversation that has become too long for its base can do without."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import TypeAlias

from modularbase.context.chat import Chat
from modularbase.context.floors import Floor, FlooredSpans, floored_spans
from modularbase.context.spans import Span
from modularbase.context_types import Tier

TokenRanges: TypeAlias = Sequence[tuple[int, int]]  # first position, how many; in order

_LAST_MESSAGES = 2  # stay whole: what was asked last, and answered


def spans_to_forget(chat: Chat, summarised: Collection[int], n_tokens: int) -> list[Span]:
    """Spans of n_tokens together, or more, that matter least; nothing with the floor `key`.

    Summaries go first, then what has no floor, then important spans, the oldest first; what the
    template wrote goes with the last span of its message.

    Args:
        chat: The conversation.
        summarised: First positions of the spans that are kept as a summary.
        n_tokens: How many tokens have to go.

    Returns:
        In order; fewer tokens where there are no more.
    """
    floored = floored_spans(chat.sections)
    first_kept = len(chat.messages) - _LAST_MESSAGES
    chosen: set[int] = set()
    n_left = n_tokens
    for unit in _in_order(floored, summarised, first_kept):
        if n_left <= 0:
            break
        chosen.update(span.start for span in unit)
        n_left -= sum(span.n_tokens for span in unit)
    spans = [span for span, _ in floored]
    frames = _empty_frames(spans, chosen, first_kept)
    return [span for span in spans if span.start in chosen or span.start in frames]


def ranges_of(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Spans in order as ranges, neighbours as one."""
    ranges: list[tuple[int, int]] = []
    for span in spans:
        if ranges and sum(ranges[-1]) == span.start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + span.n_tokens)
        else:
            ranges.append((span.start, span.n_tokens))
    return ranges


def position_after(position: int, ranges: TokenRanges) -> int | None:
    """Where a position is once ranges were taken out; None if it was in one."""
    n_before = 0
    for start, n_tokens in ranges:
        if start <= position < start + n_tokens:
            return None
        if start < position:
            n_before += n_tokens
    return position - n_before


def _in_order(
    floored: FlooredSpans, summarised: Collection[int], first_kept: int
) -> Iterator[Sequence[Span]]:
    """What may go, span by span or together, that first that matters least."""
    order: list[tuple[tuple[int, int], Sequence[Span]]] = []
    for message_index, group in groupby(floored, lambda pair: pair[0].message_index):
        said = [(span, floor) for span, floor in group if span.kind != "control"]
        ranks = {
            span: (_rank(span, floor, summarised), span.start)
            for span, floor in said
            if floor is None or floor.tier is not Tier.KEY
        }
        if message_index >= first_kept or not ranks:
            continue
        order += [(rank, [span]) for span, rank in ranks.items() if not span.core]
        # Marks tell whose the rest of a message is: they go behind it, or not at all.
        marked = [span for span in ranks if span.core]
        if marked and len(ranks) == len(said):
            order.append((max(ranks.values()), marked))
    return (unit for _, unit in sorted(order, key=lambda pair: pair[0]))


def _rank(span: Span, floor: Floor | None, summarised: Collection[int]) -> int:
    if span.start in summarised or (floor and floor.tier is Tier.REDUNDANT):
        return 0
    return 2 if floor else 1


def _empty_frames(
    spans: Sequence[Span], chosen: Collection[int], first_kept: int
) -> frozenset[int]:
    """What the template wrote around messages of which nothing is left."""
    said = {span.message_index for span in spans if span.kind != "control"}
    left = {s.message_index for s in spans if s.kind != "control" and s.start not in chosen}
    return frozenset(_frames_of(spans, said - left, first_kept))


def _frames_of(spans: Sequence[Span], messages: Collection[int], first_kept: int) -> Iterator[int]:
    # The first frame is what the conversation begins with.
    for span in spans[1:]:
        is_frame = span.kind == "control" and span.message_index < first_kept
        if is_frame and span.message_index in messages:
            yield span.start
