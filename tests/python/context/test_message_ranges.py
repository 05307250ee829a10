"""Where a template puts each message's text, whatever it does to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modularbase.bases.chat_template import ChatTemplate
from modularbase.context.message_ranges import find_message_ranges
from modularbase.errors import ChatTemplateError
from modularbase.types import Message
from tests.python.context.conftest import CHATML

TALK: list[Message] = [
    {"role": "system", "content": " Be kind. "},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "im_end"},
    {"role": "user", "content": "user\n\nassistant\n"},
]


def ranges_of(source: str, messages: list[Message]) -> list[tuple[int, str]]:
    """Each range's message and text."""
    template = ChatTemplate(source)
    text = template.render(messages)
    found = find_message_ranges(text, messages, template.render, template.render_history)
    edges = [edge for r in found for edge in (r.begin, r.end)]
    assert edges == sorted(edges) and (not edges or edges[-1] <= len(text))
    return [(r.message_index, text[r.begin : r.end]) for r in found]


def test_published_templates(llama_cpp_models_dir: Path) -> None:
    n_found = 0
    for path in sorted((llama_cpp_models_dir / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        for messages in (TALK, TALK[1:]):
            try:
                found = ranges_of(source, messages)
            except ChatTemplateError:  # it needs variables we do not give, or refuses the messages
                continue
            texts = sorted((index, text.strip()) for index, text in found)
            expected = [(i, str(message["content"]).strip()) for i, message in enumerate(messages)]
            assert texts == expected, path.name
            n_found += 1
    assert n_found > 100


def test_texts_that_look_like_the_frame() -> None:
    assert ranges_of(CHATML, TALK) == [
        (0, "Be kind."),
        (1, "user"),
        (2, "im_end"),
        (3, "user\n\nassistant"),
    ]


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        # Llama 2: the system message inside the user's, all trimmed.
        (
            "{% if m.role == 'system' %}{% set sys.text = m.content %}"
            "{% else %}[{{ sys.text }}|{{ m.content | trim }}]{% set sys.text = '' %}{% endif %}",
            [(0, "Be kind."), (1, "user"), (2, "im_end"), (3, "user\n\nassistant")],
        ),
        # A template that leaves a role out.
        (
            "{% if m.role != 'system' %}<{{ m.content }}>{% endif %}",
            [(1, "user"), (2, "im_end"), (3, "user\n\nassistant")],
        ),
        # One that changes the text.
        (
            "<{{ m.content | upper }}>",
            [(0, "BE KIND."), (1, "USER"), (2, "IM_END"), (3, "USER\n\nASSISTANT")],
        ),
    ],
    ids=["inside", "left out", "changed"],
)
def test_what_templates_do(loop: str, expected: list[tuple[int, str]]) -> None:
    source = "{% set sys = namespace(text='') %}{% for m in messages %}" + loop + "{% endfor %}"
    assert ranges_of(source, TALK) == expected


def test_thoughts_that_are_taken_out() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
        "{% endfor %}"
    )
    messages = [TALK[1], {"role": "assistant", "content": "<think>hm</think>Yes."}, TALK[1]]
    # The mark before the text is gone with the thoughts, so the frame before it counts as text.
    assert ranges_of(source, messages) == [(0, "user"), (1, "<assistant>Yes."), (2, "user")]


@pytest.mark.parametrize(
    ("loop", "first"),
    [
        ("{{ m.content | tojson(ensure_ascii=true) }};", '" Be kind. ";'),
        ("{{ m.content }}{{ m.content }};", " Be kind.  Be kind. ;"),
        ("{% if m.content | length > 11 %}long{% endif %};", ";"),
    ],
    ids=["escaped", "twice", "offended"],
)
def test_templates_that_marks_disturb(loop: str, first: str) -> None:
    source = "{% for m in messages %}" + loop + "{% endfor %}"
    found = ranges_of(source, TALK)
    assert [index for index, _ in found] == [0, 1, 2, 3]
    assert "".join(text for _, text in found) == ChatTemplate(source).render(TALK)
    assert found[0][1] == first


def test_a_beginning_that_is_no_conversation_counts_with_what_follows() -> None:
    source = (
        "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}{{ m.content | tojson(ensure_ascii=true) }};{% endfor %}"
    )
    assert ranges_of(source, TALK)[0] == (1, '" Be kind. ";"user";')


def test_marks_in_a_text() -> None:
    messages: list[Message] = [{"role": "user", "content": "a\U000f0000b\U000f0001"}, TALK[1]]
    found = ranges_of("{% for m in messages %}<{{ m.content }}>{% endfor %}", messages)
    assert found == [(0, "<a\U000f0000b\U000f0001>"), (1, "<user>")]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Co"])), min_size=1, max_size=6))
def test_any_text(contents: list[str]) -> None:
    messages: list[Message] = [{"role": "user", "content": text} for text in contents]
    assert ranges_of(CHATML, messages) == [(i, text.strip()) for i, text in enumerate(contents)]


def test_messages_that_call_tools_have_no_text_of_their_own() -> None:
    messages: list[Message] = [
        TALK[1],
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "4"},
    ]
    source = (
        "{% for m in messages %}<{{ m.content if m.content else m.tool_calls[0].name }}>"
        "{% endfor %}"
    )
    assert ranges_of(source, messages) == [(0, "user"), (2, "4")]
