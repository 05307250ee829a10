"""Spans: every token in exactly one, cut where the text allows, and the same when a chat grows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.chat import Chat, Section
from modularbase.context.spans import Span, cut_spans
from modularbase.context.text_units import split_units
from modularbase.types import Message
from tests.python.context.conftest import CHATML, ChatOf
from tests.tools.labelled_dialogues import CODE_ITEMS, make_dialogue

ANY_TEXT = st.text(st.sampled_from("ab .!?。\n`-*1)\t\"'é😀"), max_size=400) | st.text(
    st.characters(exclude_categories=["Cs", "Co"]), max_size=60
)


def spans_of(chat: Chat) -> tuple[Span, ...]:
    """The chat's spans, which cover it in order."""
    spans = cut_spans(chat.sections)
    n_tokens = 0
    for span in spans:
        assert span.start == n_tokens and span.n_tokens > 0
        n_tokens = span.end
    assert n_tokens == len(chat.token_ids)
    assert "".join(s.text for s in spans) == "".join(s.text for s in chat.sections)
    return spans


@given(ANY_TEXT)
def test_units_cover_a_text(text: str) -> None:
    edge = 0
    for unit in split_units(text):
        assert unit.begin == edge < unit.end
        edge = unit.end
    assert edge == len(text)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ('He said "no." Then he left.', ['He said "no."', " Then he left."]),
        ("Ask Dr. Li, e.g. about v1.5. Soon.", ["Ask Dr. Li, e.g. about v1.5.", " Soon."]),
        ("Am 3. Mai, z.B. um 5 Uhr. Gut.", ["Am 3. Mai, z.B. um 5 Uhr.", " Gut."]),
        ("好。很好！是吗？", ["好。", "很好！", "是吗？"]),  # noqa: RUF001
        ("a line\nanother", ["a line\n", "another"]),
        ("- one\n  more\n- two\nend", ["- one\n  more\n", "- two\n", "end"]),
        ("1. one. Yes.\n2) two", ["1. one. Yes.\n", "2) two"]),
        ("x\n```py\na. b\n\n```\ny", ["x\n", "```py\na. b\n\n```\n", "y"]),
        ("~~~\n```\n~~~\nz", ["~~~\n```\n~~~\n", "z"]),
        ("```\nnever closed. It", ["```\nnever closed. It"]),
        ("", []),
    ],
)  # fmt: skip
def test_where_text_is_cut(text: str, units: list[str]) -> None:
    assert [text[unit.begin : unit.end] for unit in split_units(text)] == units


def test_an_answer_without_text_is_cut_all_the_same() -> None:
    n_tokens = 600
    section = Section(0, (7,) * n_tokens, (0,) * n_tokens, "", 1, "assistant", False, None)
    spans = cut_spans([section])
    assert [span.n_tokens for span in spans] == [256, 256, 88]


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(ANY_TEXT, min_size=1, max_size=5))
def test_spans_cover_any_chat(contents: list[str], tokenizer: Tokenizer) -> None:
    chat = Chat(ChatTemplate(CHATML), tokenizer)
    chat.add_history([{"role": "user", "content": content} for content in contents])
    for span in spans_of(chat):
        assert span.kind == "control" or span.n_tokens <= 256


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_short_pieces_join(seed: int, tokenizer: Tokenizer) -> None:
    chat = Chat(ChatTemplate(CHATML), tokenizer)
    chat.add_history(make_dialogue(seed, n_turns=6).messages)
    spans = spans_of(chat)
    for one, next_one in pairwise(spans):
        is_neighbour = one.message_index == next_one.message_index and one.kind == next_one.kind
        if is_neighbour and min(one.n_tokens, next_one.n_tokens) < 16:
            assert one.n_tokens + next_one.n_tokens > 64


def test_spans_stay_when_a_chat_grows(tokenizer: Tokenizer) -> None:
    chat = Chat(ChatTemplate(CHATML), tokenizer)
    before: tuple[Span, ...] = ()
    for message in make_dialogue(3, n_turns=5).messages:
        if message["role"] == "assistant":
            chat.add_generated(tokenizer.encode_plain(str(message["content"])))
        else:
            chat.add_messages([message])
            if message["role"] == "system":
                chat.add_generated([])
        spans = spans_of(chat)
        assert spans[: len(before)] == before
        before = spans


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("word" + " word" * 600, " "),
        ("one line of text\n" * 120 + "end", "\n"),
        ("x" * 3000, ""),
        ("```\n" + "y = f(x)\n" * 200 + "```", "\n"),
        ("😀" * 500, ""),
    ],
    ids=["words", "lines", "letters", "code", "emoji"],
)
def test_long_texts_are_cut(text: str, at: str, chat_of: ChatOf) -> None:
    spans = [
        s for s in spans_of(chat_of([{"role": "user", "content": text}])) if s.kind != "control"
    ]
    assert len(spans) > 1 and "".join(span.text for span in spans) == text
    for span in spans[1:]:
        assert 16 <= span.n_tokens <= 256 or span is spans[-1]
        before = spans[spans.index(span) - 1].text
        assert span.text.startswith(at) or before.endswith(at)


def test_code_is_a_span_of_its_own(chat_of: ChatOf) -> None:
    code = CODE_ITEMS[0].format(word="quartz", n=7)
    message: Message = {"role": "user", "content": f"Look at this.\n{code}\nIs it right?"}
    chat = chat_of([{"role": "system", "content": "Be kind to everybody who asks."}, message])
    assert [(s.kind, s.text) for s in spans_of(chat) if s.message_index == 1][1:-1] == [
        ("prose", "Look at this.\n"),
        ("code", code + "\n"),
        ("prose", "Is it right?"),
    ]
