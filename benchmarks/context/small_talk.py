"""Sentences that mean little, from templates: what fills a long dialogue, and a haystack."""

from __future__ import annotations

import random
from collections.abc import Sequence

_TOPICS = (
    "the weather", "the garden", "my sister", "the bus", "breakfast", "the new bakery",
    "the neighbour's dog", "the radio", "the harbour", "our old bicycle", "the library",
    "the football match", "the kitchen window", "a film", "the train to the coast", "a pot of soup",
    "the market", "the piano lesson", "our holiday", "the snow", "the cat", "the corner shop",
)  # fmt: skip
_OPENERS = (
    "By the way,", "You know,", "Well,", "Anyway,", "Funny thing:", "Oh,", "So,", "Hm,",
    "Just thinking aloud:", "Before I forget,",
)  # fmt: skip
_REMARKS = (
    "I was thinking about {topic} this morning",
    "{topic} was on my mind again",
    "there is always something new about {topic}",
    "I told a friend about {topic} and we laughed for a while",
    "nothing much happened, apart from {topic}",
    "I could talk about {topic} all day",
    "{topic} was a little different from last week",
    "I had hoped to hear more about {topic}",
)
_DETAILS = (
    "It was rather quiet.", "The light was lovely.", "It took longer than I thought.",
    "Nobody seemed to mind.", "It made me smile.", "I stayed for a while.", "It went on and on.",
    "We had tea afterwards.", "It smelled of rain.", "I nearly missed it.",
)  # fmt: skip
_REPLIES = (
    "That sounds pleasant. {topic} can be a good part of a day.",
    "I see. It is nice to hear about {topic}.",
    "How nice. There is a lot to say about {topic}.",
    "I understand. Many people enjoy {topic}.",
    "Thank you for telling me about {topic}. I hope the rest of the day is good too.",
    "Good to know. {topic} seems to matter to you.",
)
_OPINIONS = (
    "What do you think about {topic}?",
    "Tell me one thing about {topic}.",
    "What is good about {topic}?",
)


def remark(draw: random.Random, story: Sequence[str], answer: Sequence[str]) -> tuple[str, str]:
    """What a user says, and a reply.

    Args:
        draw: Decides.
        story: Sentences that the user goes on with.
        answer: The same of the reply.
    """
    topic = draw.choice(_TOPICS)
    said = f"{draw.choice(_OPENERS)} {draw.choice(_REMARKS).format(topic=topic)}."
    reply = _capital(draw.choice(_REPLIES).format(topic=topic))
    return " ".join([said, *story]), " ".join([reply, *answer])


def opinion(draw: random.Random) -> str:
    """A question that has no right answer."""
    return draw.choice(_OPINIONS).format(topic=draw.choice(_TOPICS))


def filler(draw: random.Random, n_sentences: int) -> Sequence[str]:
    """Sentences for a haystack."""
    found = list[str]()
    while len(found) < n_sentences:
        topic = draw.choice(_TOPICS)
        found += [_capital(draw.choice(_REMARKS).format(topic=topic) + "."), draw.choice(_DETAILS)]
    return found[:n_sentences]


def paragraph(n_words: int) -> str:
    """A text of at least so many words."""
    return " ".join(filler(random.Random(n_words), n_words))


def _capital(text: str) -> str:
    """The text with capitals where its sentences begin."""
    parts = text.split(". ")
    return ". ".join(part[:1].upper() + part[1:] for part in parts)
