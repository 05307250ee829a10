"""Dialogues that begin with rules and parameters, go on about little, and are probed on the way."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.context import small_talk
from benchmarks.context.rules import EndsWith, Fact, NeverSays, Rule, UpperCase
from benchmarks.context.systems import TierName

PROBED_TURNS = (5, 10, 20, 30)
SMALL_TALK_SHARE = 0.6
FACT_SHARE = 0.2  # the rest are small tasks


@dataclass(frozen=True)
class Turn:
    """A user's message with a reply that obeys all rules.

    Attributes:
        user: The message.
        reply: The assistant's.
        tier: What it deserves.
    """

    user: str
    reply: str
    tier: TierName


@dataclass(frozen=True)
class Probe:
    """A question that is asked in place of a turn, and changes nothing for later ones.

    Attributes:
        turn: Counted from 1: as many turns minus one went before.
        question: The user's message.
        reply: An answer that is right, and obeys.
        fact: What must be in the answer; None: anything that obeys will do.
        fact_turn: Where the fact was said.
    """

    turn: int
    question: str
    reply: str
    fact: Fact | None = None
    fact_turn: int | None = None


@dataclass(frozen=True)
class Dialogue:
    """A script.

    Attributes:
        rules: Of the first turn, 1 to 3.
        turns: In order.
        probes: By turn.
    """

    rules: Sequence[Rule]
    turns: Sequence[Turn]
    probes: Sequence[Probe]


def make_dialogue(
    seed: int, *, n_turns: int = 30, probed_turns: Sequence[int] = PROBED_TURNS
) -> Dialogue:
    """The same dialogue for the same arguments.

    Args:
        seed: Of all that is drawn.
        n_turns: At least 5.
        probed_turns: From 2 to `n_turns`.
    """
    draw = random.Random(seed)
    rules, parameter = _rules(draw), _parameter(draw)
    planted = {1: parameter}
    turns = [_first_turn(rules, parameter)]
    facts = _planted_facts(draw)
    for number, kind in enumerate(_kinds(draw, n_turns - 1), start=2):
        if kind == "fact":
            planted[number] = next(facts)
            said, reply = planted[number].statement, "Noted, thank you."
        else:
            said, reply = small_talk.remark(draw) if kind == "small talk" else _task(draw)
        tier: TierName = "important" if kind == "fact" else "redundant"
        turns.append(Turn(said, _obeying(rules, reply), tier))
    probes = [probe for turn in probed_turns for probe in _probes(draw, rules, planted, turn)]
    return Dialogue(rules, turns, probes)


def _first_turn(rules: Sequence[Rule], parameter: Fact) -> Turn:
    numbered = [f"{n}. {rule.instruction}" for n, rule in enumerate(rules, start=1)]
    told = ["These rules hold for the whole conversation:", *numbered, parameter.statement]
    return Turn("\n".join(told), _obeying(rules, "Understood."), "key")


def _probes(
    draw: random.Random, rules: Sequence[Rule], planted: dict[int, Fact], turn: int
) -> Iterator[Probe]:
    """A free question, the parameter of turn 1, and a fact said since."""
    question, reply = small_talk.opinion(draw)
    yield Probe(turn, question, _obeying(rules, reply))
    said = [number for number in planted if 1 < number < turn]
    for number in [1, *draw.sample(said, min(1, len(said)))]:
        fact = planted[number]
        yield Probe(turn, fact.question, _obeying(rules, fact.reply), fact, number)


def _kinds(draw: random.Random, n_turns: int) -> list[str]:
    n_talk, n_fact = round(SMALL_TALK_SHARE * n_turns), max(1, round(FACT_SHARE * n_turns))
    kinds = ["small talk"] * n_talk + ["fact"] * n_fact
    kinds += ["task"] * (n_turns - len(kinds))
    draw.shuffle(kinds)
    return kinds


def _rules(draw: random.Random) -> list[Rule]:
    word = draw.choice(["OVER", "PELICAN", "MARBLE", "TANGERINE"])
    banned, instead = draw.choice([("good", "fine"), ("nice", "kind"), ("day", "date")])
    rules: list[Rule] = [EndsWith(word), UpperCase(), NeverSays(banned, instead)]
    chosen = draw.sample(range(len(rules)), draw.randint(1, 3))
    # In this order the later ones keep what the earlier ones did.
    return [rules[index] for index in (2, 0, 1) if index in chosen]


def _obeying(rules: Sequence[Rule], reply: str) -> str:
    for rule in rules:
        reply = rule.obeying(reply)
    return reply


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


def _planted_facts(draw: random.Random) -> Iterator[Fact]:
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


def _task(draw: random.Random) -> tuple[str, str]:
    first, second = draw.randint(2, 9), draw.randint(2, 9)
    return draw.choice(
        [
            (f"What is {first} plus {second}?", f"The sum is {first + second}."),
            (f"Count from {first} to {first + 2}.", f"They are {first}, {first + 1}, {first + 2}."),
            (f"Which is more, {first} or {first + second}?", f"{first + second} is more."),
        ]
    )
