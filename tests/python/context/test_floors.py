"""Floors: what structure and words protect, and that no labelled key span is ever below its own."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.chat import Chat, Section
from modularbase.context.floors import Floor, find_floors, floored_spans, spans_of
from modularbase.context.signals import WEAK, find_signals
from modularbase.context.spans import Span, cut_spans
from modularbase.context_types import Tier
from modularbase.types import Message
from tests.python.context.conftest import CHATML, ChatOf
from tests.tools.labelled_dialogues import Label, make_dialogue

# Collected without a look at the lexicons, which have learned what they lacked since.
TOLD = (Path(__file__).parent / "told_phrases.txt").read_text(encoding="utf-8").splitlines()
RANKS = {None: 0, Tier.REDUNDANT: 0, Tier.IMPORTANT: 1, Tier.KEY: 2}
CHITCHAT = "The sea was grey and quiet, and nobody was there."
FIRST: Message = {"role": "system", "content": "You are a companion for long winter evenings."}


def graded(chat: Chat) -> list[tuple[Span, Floor | None]]:
    spans = cut_spans(chat.sections)
    return list(zip(spans, find_floors(spans), strict=True))


def floors_of(chat_of: ChatOf, *messages: Message) -> list[Floor | None]:
    """The floors of the last message's text."""
    chat = chat_of([FIRST, *messages])
    return [
        floor
        for span, floor in graded(chat)
        if span.message_index == len(messages) and span.kind != "control"
    ]


def tiers_of(chat_of: ChatOf, *messages: Message) -> list[Tier | None]:
    return [floor.tier if floor else None for floor in floors_of(chat_of, *messages)]


def parts_of(
    label: Label, rows: list[tuple[Span, Floor | None]]
) -> list[tuple[Span, Floor | None]]:
    """The spans that a label's text lies in."""
    found = []
    at = 0
    for span, floor in rows:
        if span.message_index == label.message_index and span.kind != "control":
            if at < label.begin + len(label.text) and label.begin < at + len(span.text):
                found.append((span, floor))
            at += len(span.text)
    assert label.text in "".join(span.text for span, _ in found)
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**9), chat_share=st.sampled_from((0.2, 0.5, 0.8, 0.95)))
def test_no_labelled_span_is_below_its_floor(
    seed: int, chat_share: float, tokenizer: Tokenizer
) -> None:
    dialogue = make_dialogue(seed, n_turns=8, chat_share=chat_share)
    chat = Chat(ChatTemplate(CHATML), tokenizer)
    chat.add_history(dialogue.messages)
    rows = graded(chat)
    for label in dialogue.labels:
        # What is long is kept in 4 bits; this long, it has not been joined with anything either.
        is_long = len(tokenizer.encode_plain(label.text)) > 64
        least = Tier.IMPORTANT if is_long else Tier(label.tier)
        for span, floor in parts_of(label, rows):
            assert RANKS[floor.tier if floor else None] >= RANKS[least], (label, span, floor)


def test_most_chitchat_has_no_floor(tokenizer: Tokenizer) -> None:
    n_tokens = {"user": 0, "assistant": 0}
    n_free = {"user": 0, "assistant": 0}
    for seed in range(10):
        dialogue = make_dialogue(seed, n_turns=20, chat_share=0.8)
        chat = Chat(ChatTemplate(CHATML), tokenizer)
        chat.add_history(dialogue.messages)
        rows = graded(chat)
        labelled = {span.start for label in dialogue.labels for span, _ in parts_of(label, rows)}
        for span, floor in rows:
            if span.kind != "control" and span.role in n_tokens and span.start not in labelled:
                n_tokens[span.role] += span.n_tokens
                n_free[span.role] += span.n_tokens if floor is None else 0
    assert n_free["assistant"] > 0.98 * n_tokens["assistant"]
    assert n_free["user"] > 0.5 * n_tokens["user"]


def test_told_phrases_are_not_prose() -> None:
    assert [phrase for phrase in TOLD if not find_signals(phrase)] == []
    n_strong = sum(any(s.kind not in WEAK for s in find_signals(phrase)) for phrase in TOLD)
    assert n_strong > 0.85 * len(TOLD)


@pytest.mark.parametrize(
    ("role", "content", "tier"),
    [
        ("system", CHITCHAT, Tier.KEY),
        ("developer", CHITCHAT, Tier.KEY),
        ("user", CHITCHAT, None),
        ("assistant", CHITCHAT, None),
        ("user", "Always answer in rhymes.", Tier.KEY),
        ("assistant", "You should always add salt.", None),
        ("assistant", "It weighs 42 kg.", Tier.IMPORTANT),
        ("assistant", "See https://example.org", Tier.IMPORTANT),
        ("assistant", "Call `f(x)` then.", Tier.IMPORTANT),
        ("assistant", "```\nx = 1\n```", Tier.IMPORTANT),
        ("assistant", "1. First\n2. Second", None),
        ("user", "```\nx\n```", Tier.KEY),
        ("user", "- milk\n- honey", Tier.KEY),
        ("user", "colour: red", Tier.KEY),
        ("user", "Well, there is always something new about the sea.", None),
        ("user", "There is always a rule: always answer in rhymes.", Tier.KEY),
        ("user", "So, nothing much happened there.", None),
        ("user", "Nothing about the sea.", Tier.KEY),
        ("user", "Just thinking aloud: it was quiet there.", None),
        ("user", "Just think aloud.", Tier.KEY),
        ("user", "Funny thing: the sea was grey.", None),
        ("user", "Funny thing: answer in rhymes.", Tier.KEY),
        ("user", "Heute ist nicht viel passiert, es gibt immer etwas Neues.", None),
        ("user", "It was in a place named Lund.", Tier.KEY),
        ("user", "It was lovely in Lund.", Tier.IMPORTANT),
        ("user", "I work on boats.", Tier.IMPORTANT),
        ("user", "바다는 잿빛이고 조용했다.", Tier.IMPORTANT),
        ("assistant", "바다는 잿빛이고 조용했다.", None),
        ("tool", "It was quiet there.", Tier.KEY),
        ("function", "It was quiet there.", Tier.KEY),
        ("tool", CHITCHAT * 9, Tier.IMPORTANT),
    ],
)
def test_floors_by_role_and_text(
    role: str, content: str, tier: Tier | None, chat_of: ChatOf
) -> None:
    assert set(tiers_of(chat_of, {"role": role, "content": content})) == {tier}


def test_values_from_a_tool_are_kept_exactly(chat_of: ChatOf) -> None:
    values = {f"value_{i}": i for i in range(14)}
    flat, nested = json.dumps(values), json.dumps([values])
    assert set(tiers_of(chat_of, {"role": "tool", "content": flat})) == {Tier.KEY}
    assert set(tiers_of(chat_of, {"role": "tool", "content": nested})) == {Tier.IMPORTANT}
    assert set(tiers_of(chat_of, {"role": "tool", "content": "[" * 5000})) == {Tier.IMPORTANT}
    long = json.dumps({f"value_{i}": i for i in range(200)})
    assert set(tiers_of(chat_of, {"role": "tool", "content": long})) == {Tier.IMPORTANT}


def test_a_long_rule_is_important(chat_of: ChatOf) -> None:
    rule = "You must " + "really " * 60 + "be kind."
    assert tiers_of(chat_of, {"role": "user", "content": rule}) == [Tier.IMPORTANT]
    # Longer than a span: what follows the rule's first word counts, too.
    assert tiers_of(chat_of, {"role": "user", "content": rule * 3}) == [Tier.IMPORTANT] * 3


def test_a_rule_does_not_drown_in_a_long_sentence(chat_of: ChatOf) -> None:
    sentence = "It was grey and quiet" + ", and nobody was there" * 14 + "."
    tiers = tiers_of(chat_of, {"role": "user", "content": f"Never lie. {sentence}"})
    assert tiers == [Tier.KEY, None]
    rows = graded(chat_of([FIRST, {"role": "user", "content": sentence}]))
    assert 96 < sum(s.n_tokens for s, _ in rows if s.message_index == 1 and s.kind == "prose") < 190


def test_what_is_announced_is_kept_too(chat_of: ChatOf) -> None:
    text = "Remember this please, it is a story of mine." + f" {CHITCHAT}" * 20
    rows = graded(chat_of([FIRST, {"role": "user", "content": text}]))
    first, *rest = [row for row in rows if row[0].message_index == 1 and row[0].kind == "prose"]
    assert first[1] is not None and first[1].tier == Tier.KEY
    n_tokens = 0
    for span, floor in rest:
        n_tokens += span.n_tokens
        assert floor is not None and floor.reason == "announced by 'Remember'"
        assert floor.tier == (Tier.KEY if n_tokens <= 96 else Tier.IMPORTANT)
    assert n_tokens > 96
    after = {"role": "user", "content": CHITCHAT}
    assert tiers_of(chat_of, {"role": "user", "content": text}, after) == [None]


@pytest.mark.parametrize("tier", list(Tier))
def test_the_callers_tier_wins(tier: Tier, chat_of: ChatOf) -> None:
    for role, content in (
        ("user", "Never lie."),
        ("user", CHITCHAT),
        ("system", "x"),
        ("tool", "7"),
    ):
        message: Message = {"role": role, "content": content, "tier": tier.value}
        (floor,) = floors_of(chat_of, message)
        assert floor is not None and floor.is_fixed
        assert (floor.tier, floor.reason) == (tier, "set by the caller")
    # Also over the first tokens; what the template writes is no message.
    (system, *_), _ = zip(*graded(chat_of([{**FIRST, "tier": tier}])), strict=True)
    assert system.kind == "control"


def test_first_tokens_and_frame_are_key(chat_of: ChatOf) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = graded(chat_of([{"role": "user", "content": f"{CHITCHAT} " * 3}], plain))
    assert [floor and floor.tier for _, floor in rows][:2] == [Tier.KEY, None]
    assert {f and f.tier for s, f in graded(chat_of([FIRST])) if s.kind == "control"} == {Tier.KEY}


def test_a_frame_is_important_unless_its_message_is_kept(chat_of: ChatOf) -> None:
    def frame_of(message: Message) -> set[Tier | None]:
        rows = graded(chat_of([FIRST, message, {"role": "user", "content": CHITCHAT}]))
        frame = [f for s, f in rows if s.kind == "control" and s.message_index == 1]
        assert frame and {f and f.reason for f in frame} == {"written by the chat template"}
        return {f.tier if f else None for f in frame}

    assert frame_of({"role": "user", "content": CHITCHAT}) == {Tier.IMPORTANT}
    assert frame_of({"role": "assistant", "content": "There are 12."}) == {Tier.IMPORTANT}
    assert frame_of({"role": "user", "content": f"{CHITCHAT} Never lie."}) == {Tier.IMPORTANT}
    assert frame_of({"role": "system", "content": CHITCHAT}) == {Tier.KEY}
    assert frame_of({"role": "user", "content": CHITCHAT, "tier": "key"}) == {Tier.KEY}
    assert frame_of({"role": "user", "content": "Never lie.", "tier": "redundant"}) == {
        Tier.IMPORTANT
    }


def test_what_has_no_floor_is_one_with_its_neighbours_and_marks(chat_of: ChatOf) -> None:
    sections = chat_of(
        [
            FIRST,
            {"role": "user", "content": CHITCHAT},
            {"role": "assistant", "content": "So? 42."},
            {"role": "user", "content": f"{CHITCHAT} " * 12},
        ]
    ).sections
    spans = spans_of(sections)
    assert [s.start for s in spans[1:]] == [s.end for s in spans[:-1]]
    assert "".join(s.text for s in spans) == "".join(s.text for s in sections)
    frame, said = (s for s in cut_spans(sections) if s.message_index == 1)
    (span,) = (s for s in spans if s.message_index == 1)
    assert span.text == f"<|im_end|>\n<|im_start|>user\n{CHITCHAT}"
    assert (span.start, span.end, span.said) == (frame.start, said.end, said)
    assert span.kind == "prose" and dict(floored_spans(sections))[span] is None
    # A floor keeps apart what it is for, and nothing grows long.
    assert [s.kind for s in spans if s.message_index == 2] == ["control", "prose"]
    longer = [s for s in spans if s.message_index == 3]
    assert longer[0].core and longer[-1].core and len(longer) > 2
    assert all(s.said.n_tokens <= 64 and s.said.kind == "prose" for s in longer)
    assert min(a.said.n_tokens + b.said.n_tokens for a, b in pairwise(longer)) > 64


def test_what_is_said_between_marks_lies_together() -> None:
    def section(start: int, text: str) -> Section:
        is_control = text.startswith("<")
        return Section(start, (7,) * 5, tuple(range(5)), text, 3, "assistant", is_control, None)

    texts = ("<one>", "So it", "<two>", " was.", "<end>")
    spans = spans_of(tuple(section(100 + 5 * i, text) for i, text in enumerate(texts)))
    assert [(s.start, s.n_tokens, s.text) for s in spans] == [
        (100, 15, "<one>So it<two>"),
        (115, 10, " was.<end>"),
    ]
    assert [(s.said.start, s.said.n_tokens, s.said.text) for s in spans] == [
        (105, 5, "So it"),
        (115, 5, " was."),
    ]


def test_what_a_template_has_to_say_is_key() -> None:
    texts = (Span(200, n, 3, "user", "control", "x" * n, None) for n in (16, 17))
    assert [f and f.tier for f in find_floors(list(texts))] == [Tier.IMPORTANT, Tier.KEY]


@given(st.text())
def test_every_floor_has_a_reason(text: str) -> None:
    span = Span(99, 20, 0, "user", "prose", text, None)
    (floor,) = find_floors([span])
    assert floor is None or floor.reason
