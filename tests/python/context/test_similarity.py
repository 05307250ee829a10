"""Which spans have to do with what was asked."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.context.small_talk import filler
from modularbase.context.similarity import similarity_to_newest
from modularbase.context.spans import Span, cut_spans
from modularbase.context_types import ContextOptions
from modularbase.types import Message
from tests.python.context.conftest import ChatOf

FACTS = (
    ("The lighthouse keeper collects blue bottles.", "What does the lighthouse keeper collect?"),
    ("Grandmother's soup gets its taste from cardamom.", "What gives the soup its taste?"),
    ("The old clockmaker repaired only clocks without hands.", "Which clocks were repaired?"),
    ("The spare key hangs behind the painting of a ship.", "Where is the spare key?"),
    ("The baker's daughter learned the accordion.", "What did the baker's daughter learn?"),
    ("The red bicycle in the cellar is the dentist's.", "Who owns the bicycle in the cellar?"),
    ("The meeting of the chess club was moved to the gym.", "Where does the chess club meet now?"),
    ("The gardener planted lavender along the wall.", "What did the gardener plant at the wall?"),
    ("钥匙在红色的盒子里面。", "钥匙在哪里?"),
)


@pytest.mark.parametrize(("fact", "question"), FACTS)
def test_what_answers_a_question_stands_out(chat_of: ChatOf, fact: str, question: str) -> None:
    draw = random.Random(fact)
    messages: list[Message] = []
    for turn in range(30):
        said, reply = (" ".join(filler(draw, 2)) for _ in range(2))
        said = f"{said} {fact}" if turn == 8 else said
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
    messages.append({"role": "user", "content": question})
    spans = cut_spans(chat_of(messages).sections)
    newest = len(messages) - 1
    wanted = [fact[:12] in span.text for span in spans]
    others = [s.message_index < newest and not w for s, w in zip(spans, wanted, strict=True)]
    similarity = similarity_to_newest(spans)
    threshold = ContextOptions().rehydrate_above
    assert similarity[wanted].max() > threshold > similarity[others].max()


def test_bounds(chat_of: ChatOf) -> None:
    def sims(*texts: str) -> tuple[list[Span], np.ndarray]:
        messages: list[Message] = [{"role": "user", "content": text} for text in texts]
        spans = cut_spans(chat_of(messages).sections)
        return list(spans), similarity_to_newest(spans)

    spans, values = sims("one two three", "four five six", "one two three")
    of_message = {
        s.message_index: v for s, v in zip(spans, values, strict=True) if s.kind == "prose"
    }
    assert of_message == {0: pytest.approx(1.0), 1: 0.0, 2: 1.0}
    assert all(0.0 <= value <= 1.0 for value in values)
    # Where all say the same, words tell nothing.
    spans, values = sims("same words", "same words")
    assert [v for s, v in zip(spans, values, strict=True) if s.kind == "prose"] == [0.0, 1.0]
    assert similarity_to_newest(()).shape == (0,)
