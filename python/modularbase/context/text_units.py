"""Cuts a message's text where its meaning allows: code fences, list items, lines and sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

UnitKind: TypeAlias = Literal["prose", "code", "list item"]

_FENCE = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?(?:^[ \t]*(?P=fence)[ \t]*(?:\n|\Z)|\Z)",
    re.MULTILINE | re.DOTALL,
)
_LIST_ITEM = re.compile(r"[ \t]*(?:[-*+•]|\(?(?:\d{1,3}|[a-zA-Z])[.)])[ \t]+\S|[ \t]*[・●]\S")
# Behind a sentence: its stop with closing quotes and brackets, before white space; CJK stops need
# none. White space begins the next unit, as tokens begin with their space.
_STOP = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？；]+[”’」』）]*")  # noqa: RUF001
_ABBREVIATION = re.compile(
    r"(?:^|[^\w.])(?:[^\W\d_]|\d{1,3}|(?:[^\W\d_]\.)+[^\W\d_]|Dr|Mrs?|Ms|Prof|St|No|Nr|Sra?|Srta|"
    r"Mme|Hr|Fr|vs|etc|ca|bzw|usw|approx|Inc|Ltd|Co|Jr|Tel|Str|Abs|Art|Fig|cf|al|min|max)\.$"
)


@dataclass(frozen=True, slots=True)
class TextUnit:
    """The characters [begin, end) of a text, which belong together."""

    begin: int
    end: int
    kind: UnitKind


def split_units(text: str) -> Iterator[TextUnit]:
    """Cuts a text into units that cover it, in order."""
    edge = 0
    for fence in _FENCE.finditer(text):
        yield from _lines(text, edge, fence.start())
        yield TextUnit(fence.start(), fence.end(), "code")
        edge = fence.end()
    yield from _lines(text, edge, len(text))


def _lines(text: str, begin: int, end: int) -> Iterator[TextUnit]:
    """Cuts at line ends; an item of a list goes on over lines that are further in."""
    item_begin: int | None = None
    while begin < end:
        line_end = text.find("\n", begin, end) + 1 or end
        is_item = _LIST_ITEM.match(text, begin, line_end) is not None
        goes_on = item_begin is not None and text[begin] in " \t" and not is_item
        if item_begin is not None and not goes_on:
            yield TextUnit(item_begin, begin, "list item")
            item_begin = None
        if is_item:
            item_begin = begin
        elif not goes_on:
            yield from _sentences(text, begin, line_end)
        begin = line_end
    if item_begin is not None:
        yield TextUnit(item_begin, end, "list item")


def _sentences(text: str, begin: int, end: int) -> Iterator[TextUnit]:
    edge = begin
    for stop in _STOP.finditer(text, begin, end):
        if _ABBREVIATION.search(text[edge : stop.end()]):
            continue
        yield TextUnit(edge, stop.end(), "prose")
        edge = stop.end()
    if edge < end:
        yield TextUnit(edge, end, "prose")
