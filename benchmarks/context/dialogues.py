"""Dialogues that begin with rules, go on about little, and are probed at the end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

from benchmarks.context import small_talk
from benchmarks.context.rules import BeginsWith, EndsWith, Fact, LowerCase, NeverSays, Rule

FACT_SHARE = 0.5  # of what is not small talk; the rest are small tasks
N_ASIDES = 3

Passage: TypeAlias = tuple[Sequence[str], Sequence[str]]
FactKind = Literal["parameter", "code", "aside"]
"""Of the first turn; announced by the user; mentioned by the assistant, in plain words."""


@dataclass(frozen=True)
class Turn:
    """A user's message with a reply that obeys all rules."""

    user: str
    reply: str


@dataclass(frozen=True)
class Probe:
    """A question that is asked behind the dialogue, each as if there were no other.

    Attributes:
        question: The user's message.
        fact: What must be in the answer; None: anything that obeys will do.
        kind: Of the fact.
    """

    question: str
    fact: Fact | None = None
    kind: FactKind | None = None


@dataclass(frozen=True)
class Dialogue:
    """A script.

    Attributes:
        rules: Of the first turn, 1 to 3.
        turns: In order.
        following: Turns that come after, to be read only.
        probes: What is asked after the turns instead.
    """

    rules: Sequence[Rule]
    turns: Sequence[Turn]
    following: Sequence[Turn]
    probes: Sequence[Probe]


def make_dialogue(
    seed: int,
    prose: Sequence[str],
    *,
    n_turns: int = 29,
    n_following: int = 1,
    n_sentences: int = 9,
    n_opinions: int = 4,
    talk_share: float = 0.6,
) -> Dialogue:
    """The same dialogue for the same arguments.

    Args:
        seed: Of all that is drawn.
        prose: Sentences that small talk is continued with, at least twice `n_sentences`; none is
            said twice as long as there are others.
        n_turns: At least 2.
        n_following: Turns that are read after them.
        n_sentences: Of prose in a message of small talk.
        n_opinions: Probes that ask for no fact.
        talk_share: Of the turns behind the first, those that are small talk.
    """
    draw = random.Random(seed)
    rules, parameter = _rules(draw), _parameter(draw)
    codes, asides = _codes(draw), list(islice(_asides(draw), N_ASIDES))
    kinds = _kinds(draw, n_turns - 1, talk_share)
    talks = [index for index, kind in enumerate(kinds) if kind == "small talk"]
    with_aside = dict(zip(draw.sample(talks, min(N_ASIDES, len(talks))), asides, strict=False))
    turns, planted = [_first_turn(rules, parameter)], list[tuple[Fact, FactKind]]()
    passages = _passages(draw, prose, n_sentences)
    for index, kind in enumerate(kinds):
        if kind == "fact":
            code = next(codes)
            planted.append((code, "code"))
            turn = Turn(code.statement, "Noted, thank you.")
        elif kind == "small talk":
            aside = with_aside.get(index)
            planted += [(aside, "aside")] if aside else []
            turn = _talk(draw, next(passages), aside)
        else:
            turn = _task(draw)
        turns.append(_obeying(rules, turn))
    following = [_obeying(rules, _talk(draw, next(passages), None)) for _ in range(n_following)]
    probes = [Probe(small_talk.opinion(draw)) for _ in range(n_opinions)]
    facts: list[tuple[Fact, FactKind]] = [(parameter, "parameter"), *planted]
    probes += [Probe(fact.question, fact, kind) for fact, kind in facts]
    return Dialogue(rules, turns, following, probes)


def _first_turn(rules: Sequence[Rule], parameter: Fact) -> Turn:
    numbered = [f"{n}. {rule.instruction}" for n, rule in enumerate(rules, start=1)]
    told = ["These rules hold for the whole conversation:", *numbered, parameter.statement]
    return _obeying(rules, Turn("\n".join(told), "Understood."))


def _kinds(draw: random.Random, n_turns: int, talk_share: float) -> list[str]:
    n_talk = round(talk_share * n_turns)
    n_fact = max(1, round(FACT_SHARE * (n_turns - n_talk)))
    kinds = ["small talk"] * n_talk + ["fact"] * n_fact
    kinds += ["task"] * (n_turns - len(kinds))
    draw.shuffle(kinds)
    return kinds


def _rules(draw: random.Random) -> list[Rule]:
    first = draw.choice(["Certainly", "Well", "Indeed", "Listen"])
    last = draw.choice(["OVER", "PELICAN", "MARBLE", "TANGERINE"])
    banned, instead = draw.choice([("good", "fine"), ("nice", "kind"), ("day", "date")])
    # In this order the later ones keep what the earlier ones did.
    rules: list[Rule] = [NeverSays(banned, instead), BeginsWith(first), EndsWith(last), LowerCase()]
    return [rules[index] for index in sorted(draw.sample(range(len(rules)), draw.randint(1, 3)))]


def _obeying(rules: Sequence[Rule], turn: Turn) -> Turn:
    reply = turn.reply
    for rule in rules:
        reply = rule.obeying(reply)
    return Turn(turn.user, reply)


_NAMES = ("Ottilie", "Bartholomew", "Seraphina", "Leopold", "Wilhelmina", "Thaddeus")
_UNITS = ("furlongs", "ounces", "gallons", "knots", "acres", "fathoms")


def _parameter(draw: random.Random) -> Fact:
    name, unit, value = draw.choice(_NAMES), draw.choice(_UNITS), str(draw.randint(100, 999))
    return draw.choice(
        [
            Fact(f"My name is {name}.", "What is my name?", name),
            Fact(f"All lengths and weights are in {unit}.", "Which units do we use?", unit),
            Fact(f"The pressure limit is {value}.", "What is the pressure limit?", value),
        ]
    )


def _codes(draw: random.Random) -> Iterator[Fact]:
    """Facts of which no two are about the same thing, without end."""
    places = ["locker", "garage", "safe", "gate", "cellar", "studio", "boat", "attic"]
    draw.shuffle(places)
    for round_number in range(1, 100):
        for place in places:
            thing = place if round_number == 1 else f"{place} number {round_number}"
            code = str(draw.randint(1000, 9999))
            yield Fact(
                f"Please remember: the code of the {thing} is {code}.",
                f"What is the code of the {thing}?",
                code,
            )


_THINGS = ("ladder", "hammock", "telescope", "kettle", "umbrella", "accordion")
_PLACES = ("stable", "orchard", "chimney", "greenhouse", "bakery", "lighthouse")


def _asides(draw: random.Random) -> Iterator[Fact]:
    """Facts in words that nothing gives away."""
    things, places = (draw.sample(names, len(names)) for names in (_THINGS, _PLACES))
    for thing, place in zip(things, places, strict=True):
        said = f"The {thing} stands behind the {place} and has been there since spring."
        yield Fact(said, f"Where does the {thing} stand?", place)


def _passages(draw: random.Random, prose: Sequence[str], n: int) -> Iterator[Passage]:
    """What a user and an assistant go on with, n sentences each, without end."""
    starts = list(range(0, len(prose) - 2 * n + 1, 2 * n))
    while True:
        for first in draw.sample(starts, len(starts)):
            yield prose[first : first + n], prose[first + n : first + 2 * n]


def _talk(draw: random.Random, passage: Passage, aside: Fact | None) -> Turn:
    story, answer = passage[0], list(passage[1])
    if aside:
        answer.insert(len(answer) // 2, aside.statement)
    return Turn(*small_talk.remark(draw, story, answer))


def _task(draw: random.Random) -> Turn:
    first, second = draw.randint(2, 9), draw.randint(2, 9)
    return draw.choice(
        [
            Turn(f"What is {first} plus {second}?", f"The sum is {first + second}."),
            Turn(
                f"Count from {first} to {first + 2}.",
                f"They are {first}, {first + 1}, {first + 2}.",
            ),
            Turn(f"Which is more, {first} or {first + second}?", f"{first + second} is more."),
        ]
    )
