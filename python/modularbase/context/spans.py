"""Cuts a conversation into spans: the pieces of text that are graded as one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias

from modularbase.context.chat import Section
from modularbase.context.text_units import TextUnit, split_units
from modularbase.context_types import Tier

SpanKind: TypeAlias = Literal["control", "prose", "code", "list item"]
Piece: TypeAlias = tuple[int, int, SpanKind]  # the tokens [begin, end) of a section

_MIN_TOKENS = 16  # a shorter piece joins its neighbour, as far as
MERGED_TOKENS = 64  # they stay short together: a rule must not drown in what surrounds it
_MAX_TOKENS = 256
_CACHED_SECTIONS = 1024


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens that share a tier.

    Attributes:
        start: Position of the first token.
        n_tokens: How many.
        message_index: The message they belong to.
        role: Of that message.
        kind: What they are: "control" is what the template puts around messages.
        text: What they say.
        tier: What the caller said of the message, or None.
        is_part: Whether it is cut out of a sentence that is too long for a span.
        core: What is said between marks of the template that it begins or ends with; None: all.
    """

    start: int
    n_tokens: int
    message_index: int
    role: str
    kind: SpanKind
    text: str
    tier: Tier | None
    is_part: bool = False
    core: Span | None = None

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + self.n_tokens

    @property
    def said(self) -> Span:
        """The span without such marks."""
        return self.core or self

    def joined(self, other: Span) -> Span:
        """The two as one: its neighbour, of the same message."""
        said = [span.said for span in (self, other) if span.kind != "control"]
        core = said[0] if len(said) == 1 else _concatenated(*said)
        whole = replace(_concatenated(self, other), kind=core.kind)
        return replace(whole, core=core) if core.n_tokens < whole.n_tokens else whole


def _concatenated(first: Span, second: Span) -> Span:
    n_tokens, text = first.n_tokens + second.n_tokens, first.text + second.text
    return replace(first, n_tokens=n_tokens, text=text, core=None)


def cut_spans(sections: Iterable[Section]) -> tuple[Span, ...]:
    """Cuts sections into spans: every token is in exactly one, and they come in order.

    Spans of a section do not depend on the others, so they stay when a conversation grows.
    """
    return tuple(span for section in sections for span in _spans(section))


@lru_cache(maxsize=_CACHED_SECTIONS)  # a turn looks at all sections several times
def _spans(section: Section) -> tuple[Span, ...]:
    n_tokens = len(section.token_ids)
    if section.is_control:
        return (_span(section, 0, n_tokens, "control"),)
    # First with what follows, so that a rule takes along as little as possible; then what is left.
    pieces = _joined(_joined(_pieces(section), _is_short), _ends_short)
    return tuple(
        _span(section, begin, end, kind, is_part=piece_end - piece_begin > _MAX_TOKENS)
        for piece_begin, piece_end, kind in pieces
        for begin, end in _cut(section, piece_begin, piece_end)
    )


def _pieces(section: Section) -> Iterator[Piece]:
    """The units of a section's text, in tokens."""
    n_tokens = len(section.token_ids)
    units = list(split_units(section.text)) or [TextUnit(0, 0, "prose")]
    for unit in units:
        begin = bisect_left(section.token_starts, unit.begin)
        end = bisect_left(section.token_starts, unit.end)
        if unit is units[-1]:
            end = n_tokens  # some may stand for no character of their own
        if begin < end:
            yield begin, end, unit.kind


def _is_short(piece: Piece, _: Piece) -> bool:
    return piece[1] - piece[0] < _MIN_TOKENS


def _ends_short(_: Piece, next_piece: Piece) -> bool:
    return _is_short(next_piece, next_piece)


def _joined(pieces: Iterable[Piece], belong: Callable[[Piece, Piece], bool]) -> list[Piece]:
    """Joins pieces of a kind with their neighbours where they belong together."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else piece
        fits = last[2] == piece[2] and piece[1] - last[0] <= MERGED_TOKENS
        if found and fits and belong(last, piece):
            found[-1] = (last[0], *piece[1:])
        else:
            found.append(piece)
    return found


def _cut(section: Section, begin: int, end: int) -> Iterable[tuple[int, int]]:
    """Cuts a piece that is too long."""
    while end - begin > _MAX_TOKENS:
        cut = _good_cut(section, begin, begin + _MAX_TOKENS)
        yield begin, cut
        begin = cut
    yield begin, end


def _good_cut(section: Section, begin: int, limit: int) -> int:
    """The last line end, else white space, else character before the limit."""
    text, starts = section.text, section.token_starts
    choices: Sequence[int] = range(limit, begin + _MIN_TOKENS, -1)
    for cut in choices:
        if text[starts[cut] - 1 : starts[cut]] == "\n":
            return cut
    for cut in choices:
        if text[starts[cut] : starts[cut] + 1].isspace():
            return cut
    return next((cut for cut in choices if starts[cut] > starts[cut - 1]), limit)


def _span(section: Section, begin: int, end: int, kind: SpanKind, *, is_part: bool = False) -> Span:
    starts = section.token_starts
    stop = starts[end] if end < len(starts) else len(section.text)
    return Span(
        start=section.start + begin,
        n_tokens=end - begin,
        message_index=section.message_index,
        role=section.role,
        kind=kind,
        text=section.text[starts[begin] : stop],
        tier=section.tier,
        is_part=is_part,
    )
