"""Where in a rendered chat the text of each message is.

A template decides what surrounds a message, and some change its text. So the messages are rendered
once more with a mark of their own before and behind each text; where the marked rendering is the
plain one but for the marks, these tell the ranges. Templates that take offence at marks are
rendered message by message instead, and a message is all that came with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from modularbase.errors import ChatTemplateError
from modularbase.types import Message

Render: TypeAlias = Callable[[Sequence[Message]], str]

# Two private characters a message (plane 15): nobody's text, and no white space to be trimmed.
_FIRST_MARK = 0xF0000
_MAX_MARKED = 0x7FF0
_MARK = re.compile("[\U000f0000-\U000fffef]")


@dataclass(frozen=True, slots=True)
class MessageRange:
    """The characters [begin, end) of a rendered chat that are a message's own."""

    message_index: int
    begin: int
    end: int


def find_message_ranges(
    text: str, messages: Sequence[Message], render: Render, render_history: Render
) -> list[MessageRange]:
    """Finds the text of each message, in the order of the text; what a template left out has none.

    Args:
        text: What `render` makes of the messages.
        messages: The conversation.
        render: Renders messages as they were.
        render_history: Renders messages without the beginning of an answer.
    """
    try:
        marked = render([_marked(i, message) for i, message in enumerate(messages[:_MAX_MARKED])])
    except ChatTemplateError:
        marked = ""
    found = _ranges_of_marks(text, marked) if len(messages) <= _MAX_MARKED else None
    return _ranges_by_growth(text, messages, render_history) if found is None else found


def _marked(index: int, message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    core = content.strip()  # templates trim white space, which is not inside a mark
    begin = content.index(core) if core else 0
    opening, closing = chr(_FIRST_MARK + 2 * index), chr(_FIRST_MARK + 2 * index + 1)
    marked = content[:begin] + opening + core + closing + content[begin + len(core) :]
    return {**message, "content": marked}


def _ranges_of_marks(text: str, marked: str) -> list[MessageRange] | None:
    """The ranges between marks; None if the marks have changed more than they should."""
    places: dict[int, int] = {}  # of a mark's number: its place in the text without marks
    for n_marks_before, match in enumerate(_MARK.finditer(marked)):
        number = ord(match[0]) - _FIRST_MARK
        if number in places:
            return None  # a message that comes twice
        places[number] = match.start() - n_marks_before
    if _MARK.sub("", marked) != text:
        return None
    ranges: list[MessageRange] = []
    edge = 0  # of the last mark before this one
    for number, place in places.items():  # in the order of the text
        if number % 2:  # a template that cut the beginning off has kept the end alone
            begin = places.get(number - 1, edge)
            if begin < (ranges[-1].end if ranges else 0):
                return None
            ranges.append(MessageRange(number // 2, begin, place))
        edge = place
    whole = {r.message_index for r in ranges}
    return ranges if all(number // 2 in whole for number in places) else None


def _ranges_by_growth(
    text: str, messages: Sequence[Message], render_history: Render
) -> list[MessageRange]:
    """What each message adds to the rendering of those before it, surroundings included."""
    ranges: list[MessageRange] = []
    edge = 0
    for n_messages in range(1, len(messages) + 1):
        try:
            rendered = render_history(messages[:n_messages])
        except ChatTemplateError:
            continue  # not a conversation yet: it counts as a part of the next message
        end = max(edge, _n_common(text, rendered))
        ranges.append(MessageRange(n_messages - 1, edge, end))
        edge = end
    return ranges


def _n_common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
