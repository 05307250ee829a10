"""Grading with the default base's own template and tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.chat import Chat
from modularbase.context.costs import TierCosts
from modularbase.context.floors import spans_of
from modularbase.context.plan import ContextGrader
from modularbase.context_types import ContextOptions, Tier
from modularbase.gguf_file import read_metadata
from tests.tools.labelled_dialogues import LabelledDialogue, make_dialogue

RANKS = {Tier.REDUNDANT: 0, Tier.IMPORTANT: 1, Tier.KEY: 2}


@pytest.fixture(scope="module")
def metadata(smollm2: Path) -> dict[str, object]:
    return read_metadata(smollm2)


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, object]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata)


def lowest_tier(dialogue: LabelledDialogue, chat: Chat, tiers: bytes, label: int) -> Tier:
    """The lowest tier of a token of a label's text."""
    wanted = dialogue.labels[label]
    found = []
    at = 0
    for section in chat.sections:
        if section.message_index != wanted.message_index or section.is_control:
            continue
        for n, start in enumerate(section.token_starts):
            if wanted.begin <= at + start < wanted.begin + len(wanted.text):
                found.append(list(Tier)[tiers[section.start + n]])
        at += len(section.text)
    return min(found, key=RANKS.__getitem__)


@pytest.mark.parametrize("seed", range(6))
def test_thirty_turns_shrink_and_nothing_told_is_lost(
    seed: int, tokenizer: Tokenizer, metadata: dict[str, object]
) -> None:
    template = ChatTemplate.from_metadata(metadata)
    dialogue = make_dialogue(seed, n_turns=30, chat_share=0.9)
    chat = Chat(template, tokenizer)
    chat.add_history(dialogue.messages)
    rendered = template.render_history(dialogue.messages)
    assert list(chat.token_ids) == tokenizer.encode_chat(rendered)
    costs = TierCosts.from_metadata("smollm2", metadata)
    assert costs.key_token_bytes == 23040
    options = ContextOptions(demote_after_checks=1)
    free = ContextGrader().plan(chat, None, costs, options)
    tight = replace(options, budget_bytes=int(0.75 * free.report.total_bytes))
    plan = ContextGrader().plan(chat, None, costs, tight)
    assert plan.report.total_bytes <= tight.budget_bytes < 0.5 * plan.report.exact_bytes
    assert plan.report.tokens[Tier.REDUNDANT] > 0.2 * len(chat.token_ids)
    for i, label in enumerate(dialogue.labels):
        n_tokens = len(tokenizer.encode_plain(label.text))
        least = Tier(label.tier) if n_tokens <= 64 else Tier.IMPORTANT
        assert RANKS[lowest_tier(dialogue, chat, plan.tiers, i)] >= RANKS[least], label


def test_turn_by_turn_is_as_at_once(tokenizer: Tokenizer, metadata: dict[str, object]) -> None:
    template = ChatTemplate.from_metadata(metadata)
    chat = Chat(template, tokenizer)
    before: tuple[object, ...] = ()
    for turn in range(5):
        chat.add_messages([{"role": "user", "content": f"Never say {turn}. How are you?"}])
        chat.add_generated([*tokenizer.encode_plain("I am fine, thank you so much."), 2])
        spans = spans_of(chat.sections)
        assert spans[: len(before)] == before
        before = spans
    rendered = template.render_history(chat.messages)
    assert [*chat.token_ids, *tokenizer.encode_plain("\n")] == tokenizer.encode_chat(rendered)
