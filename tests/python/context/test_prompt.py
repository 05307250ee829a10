"""Prompts that no template wrote: the same tokens, all of them in a section."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.floors import find_floors
from modularbase.context.prompt import PlainPrompt, ids_prompt, text_prompt
from modularbase.context.spans import cut_spans
from modularbase.context_types import Tier

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def check(prompt: PlainPrompt) -> None:
    """Every token is in one section and in one span, in order."""
    for pieces in (prompt.sections, cut_spans(prompt.sections)):
        at = 0
        for piece in pieces:
            assert piece.start == at
            at += len(piece.token_ids) if hasattr(piece, "token_ids") else piece.n_tokens
        assert at == len(prompt.token_ids)


@given(text=UNICODE)
def test_text(tokenizer: Tokenizer, text: str) -> None:
    prompt = text_prompt(text, tokenizer)
    assert list(prompt.token_ids) == tokenizer.encode(text)
    assert "".join(section.text for section in prompt.sections) == text
    check(prompt)


@given(st.lists(st.integers(0, 1999), max_size=400))
def test_ids(ids: list[int]) -> None:
    prompt = ids_prompt(ids)
    assert list(prompt.token_ids) == ids
    check(prompt)
    assert not any(find_floors(cut_spans(prompt.sections))[1:])


def test_a_text_has_a_users_floors(tokenizer: Tokenizer) -> None:
    text = "It was a nice day in the garden, and we had some tea.\n" * 3 + "- Never say no.\n"
    spans = cut_spans(text_prompt(text, tokenizer).sections)
    floors = find_floors(spans)
    assert floors[-1] is not None and floors[-1].tier is Tier.KEY
    assert {span.role for span in spans} == {"user"}
