"""What goes when a conversation has become too long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularbase.context.chat import Chat
from modularbase.context.floors import floored_spans, spans_of
from modularbase.context.forgetting import position_after, ranges_of, spans_to_forget
from modularbase.context_types import Tier
from modularbase.errors import InvalidRequestError
from modularbase.types import Message
from tests.python.context.conftest import ChatOf
from tests.tools.labelled_dialogues import make_dialogue

CHATTER = "The sea was grey and quiet there, and the harbour was full of boats. "


@pytest.fixture
def long_chat(chat_of: ChatOf) -> Chat:
    """A generated dialogue."""
    return chat_of(make_dialogue(3, 30, 0.5).messages)


def test_nothing_that_must_be_kept_exactly_goes(long_chat: Chat) -> None:
    everything = spans_to_forget(long_chat, (), 10**9)
    floored = floored_spans(long_chat.sections)
    gone = {span.start for span in everything}
    kept = {s.message_index for s, floor in floored if floor and floor.tier is Tier.KEY}
    for span, floor in floored:
        if span.kind != "control":
            must_stay = floor is not None and floor.tier is Tier.KEY
            is_marked = span.core is not None and span.message_index in kept
            is_last = span.message_index >= len(long_chat.messages) - 2
            assert (span.start in gone) == (not must_stay and not is_marked and not is_last)
    assert floored[0][0].start not in gone


def test_marks_go_with_the_last_of_their_message(chat_of: ChatOf) -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": CHATTER * 12},
        {"role": "user", "content": CHATTER * 4 + "You must always answer in rhymes."},
        {"role": "assistant", "content": CHATTER},
        {"role": "user", "content": "And now?"},
    ]
    chat = chat_of(messages)
    spans = spans_of(chat.sections)
    opening, *rest = (s for s in spans if s.message_index == 1)
    assert opening.core and len(rest) >= 3 and not any(span.core for span in rest)
    for n_gone in range(1, len(rest) + 1):
        n_tokens = sum(span.n_tokens for span in rest[:n_gone])
        assert spans_to_forget(chat, (), n_tokens) == rest[:n_gone]
    assert spans_to_forget(chat, {opening.start}, 1) == rest[:1]
    everything = spans_to_forget(chat, (), 10**9)
    assert opening in everything
    # What stays of a message keeps its marks.
    kept = [s for s in spans if s.message_index == 2 and s not in everything]
    assert kept[0].core and any(s.message_index == 2 for s in everything)


def test_what_matters_least_goes_first(chat_of: ChatOf) -> None:
    messages: list[Message] = [
        {"role": "user", "content": "You must always answer in rhymes."},
        {"role": "assistant", "content": "It has 42 rooms, as I said. " + CHATTER},
        {"role": "user", "content": CHATTER * 2},
        {"role": "assistant", "content": CHATTER * 3},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Nothing."},
    ]
    chat = chat_of(messages)
    spans = spans_of(chat.sections)
    of_message = {i: [s for s in spans if s.message_index == i] for i in range(6)}
    (first,) = spans_to_forget(chat, (), 1)
    assert first.message_index == 2 and first.kind == "prose"  # 1 has a number
    summarised = [s for s in of_message[3] if s.kind == "prose"][-1]
    assert spans_to_forget(chat, {summarised.start}, 1) == [summarised]
    n_tokens = sum(s.n_tokens for s in of_message[2] if s.kind == "prose")
    # With all that a message says goes the frame around it.
    assert spans_to_forget(chat, (), n_tokens) == of_message[2]


def test_the_rest_is_cut_as_before(long_chat: Chat) -> None:
    before = spans_of(long_chat.sections)
    chosen = spans_to_forget(long_chat, (), len(long_chat.token_ids) // 3)
    ranges = ranges_of(chosen)
    gone = {span.start for span in chosen}
    long_chat.forget(ranges)
    left = [span for span in before if span.start not in gone]
    after = spans_of(long_chat.sections)
    assert [(s.text, s.n_tokens, s.message_index) for s in after] == [
        (s.text, s.n_tokens, s.message_index) for s in left
    ]
    assert [s.start for s in after] == [position_after(s.start, ranges) for s in left]
    assert long_chat.token_ids == tuple(
        token for section in long_chat.sections for token in section.token_ids
    )


def test_what_was_apart_stays_apart(chat_of: ChatOf) -> None:
    longer = f"{CHATTER.strip(' .')}, and {CHATTER.lower()}"
    messages: list[Message] = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": CHATTER + longer + CHATTER},
        {"role": "user", "content": "And now?"},
    ]
    chat = chat_of(messages)
    first, middle, last = (s for s in spans_of(chat.sections) if s.message_index == 1)
    assert first.said.n_tokens + last.said.n_tokens <= 64  # they would go together
    chat.forget([(middle.start, middle.n_tokens)])
    left = [s for s in spans_of(chat.sections) if s.message_index == 1]
    assert [(s.start, s.text) for s in left] == [
        (first.start, first.text),
        (first.end, last.text),
    ]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_ranges(data: st.DataObject) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=1, max_size=60))
    ranges: list[tuple[int, int]] = []
    for position, is_gone in enumerate(flags):
        if is_gone and ranges and sum(ranges[-1]) == position:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        elif is_gone:
            ranges.append((position, 1))
    left = [p for p, is_gone in enumerate(flags) if not is_gone]
    for position, is_gone in enumerate(flags):
        expected = None if is_gone else left.index(position)
        assert position_after(position, ranges) == expected


def test_not_before_the_answer(long_chat: Chat) -> None:
    long_chat.add_messages([{"role": "user", "content": "Well?"}])
    with pytest.raises(InvalidRequestError, match="ranges"):
        long_chat.forget([(20, 3)])
