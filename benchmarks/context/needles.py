"""Needles in haystacks: values said once in filler text, at a depth."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.context.small_talk import filler
from benchmarks.context.systems import TierName

DEPTHS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Segment:
    """A piece of the context.

    Attributes:
        text: With a space at its end.
        tier: What the caller says of it.
    """

    text: str
    tier: TierName


@dataclass(frozen=True)
class Haystack:
    """A context with needles, of which one is asked for.

    Attributes:
        kind: Of KINDS.
        depth: Of the needle that is asked for, as a share of the filler.
        segments: In order; filler is redundant, needles are important.
        question: Begins a sentence that the answer completes.
        answer: Digits or a word.
    """

    kind: str
    depth: float
    segments: Sequence[Segment]
    question: str
    answer: str

    def in_tier(self, tier: TierName) -> Haystack:
        """The same words, needles in another tier."""
        segments = [replace(s, tier=tier) if s.tier == "important" else s for s in self.segments]
        return replace(self, segments=segments)


@dataclass(frozen=True)
class Needles:
    """What is planted: the first is asked for, the others lie anywhere."""

    sentences: Sequence[str]
    question: str
    answer: str


def make_haystack(kind: str, *, depth: float, n_sentences: int, seed: int) -> Haystack:
    """The same haystack for the same arguments.

    Args:
        kind: Of KINDS.
        depth: 0 is the beginning, 1 the end.
        n_sentences: Of filler.
        seed: Of all that is drawn.
    """
    draw = random.Random(f"{kind} {depth} {seed}")
    needles = KINDS[kind](draw)
    hay = [Segment(f"{sentence} ", "redundant") for sentence in filler(draw, n_sentences)]
    others = [draw.randint(0, n_sentences) for _ in needles.sentences[1:]]
    places = [round(depth * n_sentences), *others]
    planted = zip(places, needles.sentences, strict=True)
    for place, sentence in sorted(planted, reverse=True):
        hay.insert(place, Segment(f"{sentence} ", "important"))
    return Haystack(kind, depth, hay, needles.question, needles.answer)


def _passkey(draw: random.Random) -> Needles:
    key = _digits(draw, 6)
    return Needles([f"The pass key is {key}. Remember it."], "The pass key is", key)


def _multi_key(draw: random.Random) -> Needles:
    places = draw.sample(["Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Quebec", "Accra"], 4)
    keys = [_digits(draw, 6) for _ in places]
    pairs = zip(places, keys, strict=True)
    sentences = [f"The pass key of {place} is {key}." for place, key in pairs]
    return Needles(sentences, f"The pass key of {places[0]} is", keys[0])


def _key_value(draw: random.Random) -> Needles:
    names = [_digits(draw, 4) for _ in range(3)]
    values = draw.sample(["copper", "velvet", "walnut", "indigo", "granite", "saffron"], 3)
    pairs = zip(names, values, strict=True)
    sentences = [f"Setting {name} has the value {value}." for name, value in pairs]
    return Needles(sentences, f"Setting {names[0]} has the value", values[0])


def _plain_words(draw: random.Random) -> Needles:
    things = draw.sample(["hammock", "ladder", "kettle", "umbrella", "accordion"], 3)
    places = draw.sample(["bakery", "stable", "chimney", "orchard", "lighthouse"], 3)
    pairs = zip(things, places, strict=True)
    sentences = [f"The {thing} stands behind the {place} until spring." for thing, place in pairs]
    return Needles(sentences, f"The {things[0]} stands behind the", places[0])


KINDS: Mapping[str, Callable[[random.Random], Needles]] = {
    "pass key": _passkey,
    "one of four keys": _multi_key,
    "key and value": _key_value,
    "plain words": _plain_words,
}


def _digits(draw: random.Random, n_digits: int) -> str:
    return "".join(str(draw.randint(1, 9)) for _ in range(n_digits))
