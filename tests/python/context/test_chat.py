"""A conversation's tokens: the same as if it were encoded at once, and kept when it grows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.chat import Chat
from modularbase.context_types import Tier
from modularbase.errors import ChatTemplateError, InvalidRequestError
from modularbase.types import Message
from tests.python.context.conftest import CHATML, ChatOf
from tests.tools.labelled_dialogues import make_dialogue

HI: Message = {"role": "user", "content": "Hi there!"}


@pytest.fixture
def chat(tokenizer: Tokenizer) -> Chat:
    return Chat(ChatTemplate(CHATML), tokenizer)


def checked(chat: Chat, tokenizer: Tokenizer) -> Chat:
    """The chat, if its sections are its tokens and say what these say."""
    ids = [token_id for section in chat.sections for token_id in section.token_ids]
    assert tuple(ids) == chat.token_ids
    assert "".join(s.text for s in chat.sections) == tokenizer.decode_with_special(ids)
    n_tokens = 0
    for section in chat.sections:
        assert section.start == n_tokens
        n_tokens += len(section.token_ids)
        assert list(section.token_starts) == sorted(section.token_starts)
        assert section.token_starts[0] == 0
        assert chat.messages[section.message_index]["role"] == section.role
    return chat


def test_sections_are_texts_and_what_is_around_them(chat_of: ChatOf, tokenizer: Tokenizer) -> None:
    chat = checked(chat_of([HI, {"role": "assistant", "content": "Hello."}]), tokenizer)
    assert [(s.message_index, s.is_control, s.text) for s in chat.sections] == [
        (
            0,
            True,
            "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n",
        ),
        (0, False, "Hi there!"),
        (1, True, "<|im_end|>\n<|im_start|>assistant\n"),
        (1, False, "Hello."),
        (1, True, "<|im_end|>\n"),
    ]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_turn_by_turn_is_as_at_once(seed: int, tokenizer: Tokenizer) -> None:
    rng = random.Random(seed)
    messages = make_dialogue(seed, n_turns=4).messages
    chat = Chat(ChatTemplate(CHATML), tokenizer)
    waiting: list[Message] = []
    for message in messages:
        if message["role"] != "assistant":
            waiting.append(message)
            continue
        seen = len(chat.token_ids)
        assert chat.add_messages(waiting) == list(chat.token_ids[seen:])
        waiting = []
        answer = tokenizer.encode_plain(str(message["content"]))
        chat.add_generated([*answer, 2] if rng.random() < 0.5 else answer)
    chat.add_messages([HI])
    checked(chat, tokenizer)
    at_once = ChatTemplate(CHATML).render([*messages, HI])
    assert list(chat.token_ids) == tokenizer.encode_chat(at_once)


def test_generated_tokens_stay_as_they_are(chat: Chat, tokenizer: Tokenizer) -> None:
    chat.add_messages([HI])
    answer = [tokenizer.token_id(c) or 0 for c in "Hello"]  # letter by letter
    assert answer != tokenizer.encode_plain("Hello")
    chat.add_generated(answer)
    added = chat.add_messages([HI])
    assert chat.token_ids[-len(added) - 5 : -len(added)] == tuple(answer)
    expected = "<|im_end|>\n<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode_with_special(added) == expected
    assert chat.messages[1] == {"role": "assistant", "content": "Hello"}
    checked(chat, tokenizer)


def test_an_answer_of_any_bytes(chat: Chat, tokenizer: Tokenizer) -> None:
    chat.add_messages([HI])
    emoji = [tokenizer.token_id(c) or 0 for c in "ðŁĺ"]  # an emoji without its last byte
    chat.add_generated([*emoji, 1, *emoji, *tokenizer.encode_plain(" \n ")])
    chat.add_messages([HI])
    checked(chat, tokenizer)
    kinds = [section.is_control for section in chat.sections]
    assert kinds == [True, False, True, False, True, False, True, False, True]


def test_an_empty_answer(chat: Chat, tokenizer: Tokenizer) -> None:
    chat.add_messages([HI])
    chat.add_generated([])
    chat.add_messages([HI])
    at_once = ChatTemplate(CHATML).render([HI, {"role": "assistant", "content": ""}, HI])
    assert list(checked(chat, tokenizer).token_ids) == tokenizer.encode_chat(at_once)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content if m.role != 'assistant' }}\n{% endfor %}",
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}",
    ],
    ids=["escapes", "forgets answers", "beginning"],
)
def test_other_templates(source: str, tokenizer: Tokenizer) -> None:
    chat = Chat(ChatTemplate(source, bos_token="<|endoftext|>"), tokenizer)
    chat.add_messages([HI])
    chat.add_generated(tokenizer.encode_plain("Yes, of course."))
    added = chat.add_messages([HI])
    assert "Hi there!" in tokenizer.decode_with_special(added)
    assert "of course" not in tokenizer.decode_with_special(added)
    assert 0 not in added  # the beginning comes once
    checked(chat, tokenizer)


def test_control_tokens_that_a_user_writes(chat_of: ChatOf, tokenizer: Tokenizer) -> None:
    chat = checked(chat_of([{"role": "user", "content": "a<|im_end|>b"}]), tokenizer)
    assert [(s.text, s.is_control) for s in chat.sections[1:4]] == [
        ("a", False),
        ("<|im_end|>", True),
        ("b", False),
    ]


def test_tiers_belong_to_messages(tokenizer: Tokenizer) -> None:
    # A template that would show it.
    source = "{% for m in messages %}{{ m.content }}{{ m.tier }};{% endfor %}"
    chat = Chat(ChatTemplate(source), tokenizer)
    chat.add_messages([{**HI, "tier": "key"}, {**HI, "tier": Tier.REDUNDANT}, HI])
    texts = [(s.text, s.tier) for s in chat.sections if not s.is_control]
    assert texts == [
        ("Hi there!", Tier.KEY),
        ("Hi there!", Tier.REDUNDANT),
        ("Hi there!", None),
    ]


def test_order_of_turns(chat: Chat) -> None:
    with pytest.raises(InvalidRequestError, match="messages to answer first"):
        chat.add_generated([5])
    chat.add_messages([HI])
    with pytest.raises(InvalidRequestError, match="the answer first"):
        chat.add_messages([HI])
    with pytest.raises(InvalidRequestError, match="empty conversation"):
        chat.add_history([HI])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([HI, {**HI, "tier": "gold"}], "messages[1].tier"),
        ([HI, {**HI, "tier": 3}], "messages[1].tier"),
        ([{"role": "user"}], "messages[0].content"),
    ],
)
def test_malformed_messages_change_nothing(messages: list[Message], field: str, chat: Chat) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat.add_messages(messages)
    assert caught.value.field == field
    assert (chat.token_ids, chat.messages, chat.sections) == ((), (), ())
    chat.add_messages([HI])


def test_a_template_that_refuses(tokenizer: Tokenizer) -> None:
    chat = Chat(ChatTemplate("{{ raise_exception('no') }}"), tokenizer)
    with pytest.raises(ChatTemplateError):
        chat.add_messages([HI])
    assert chat.token_ids == ()
