"""`modularbase demo context`: a dialogue whose context shrinks, and whose first rule holds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import typer

from modularbase.byte_sizes import parse_bytes
from modularbase.cli.console import DEFAULT_BASE, Base, Json, err
from modularbase.cli.context_rows import (
    Answer,
    ContextRow,
    Probe,
    print_head,
    print_json_line,
    print_line,
)
from modularbase.cli.options import Threads
from modularbase.context_types import ContextOptions, Tier
from modularbase.conversation import Conversation
from modularbase.engine import Engine
from modularbase.types import Result, SamplingParams

_WORD = "Arrr"
_RULE = (
    "You are a pirate called Captain Redbeard. Always talk like a pirate and say Arrr. Who are you?"
)
_QUESTION = "What is the capital of France?"
_PROBED_TURNS = (5, 10, 20, 30)
# What a base of 135M parameters has something to say to, and nothing that must be kept.
_SMALL_TALK = (
    "It rained all night, and then it was sunny again. The street was wet and shiny, the birds "
    "were loud, and the air was fresh and cool. What did you eat today?",
    "The sea was calm this morning, and it looked lovely. The waves were slow and the sand was "
    "warm, and some people were sitting in the sun. Do you like music?",
    "There was soup for lunch, and it was quite good. It was hot and a bit salty, and the bread "
    "was soft and still warm from the oven. What makes you happy?",
    "A big bird sat on the roof and sang for a while. Then it flew over the trees and was gone, "
    "and the house was quiet until the evening. Do you like to dance?",
    "The garden is full of flowers, and they smell nice. The roses are red and the grass is green, "
    "and the bees are busy all day long. What does the wind sound like?",
    "We baked bread together, and it smelled wonderful. The kitchen was a mess, but it was fun, "
    "and everybody was laughing and singing. Do you sleep well?",
    "The cat slept on the sofa for the whole afternoon. It was lying in the sun and dreaming, and "
    "its ears were moving a little now and then. What is fun about ships?",
    "The film was long and slow, but the pictures were pretty. The end was sad, and the people "
    "around us were crying a little on the way out. Do you like the snow?",
)
# Greedy, so that it can be repeated; a small base would say the same all the time otherwise.
_PARAMS = SamplingParams(max_tokens=24, temperature=0, repeat_penalty=1.15, repeat_last_n=24)


def context(
    base: Base = DEFAULT_BASE,
    turns: Annotated[int, typer.Option(min=1, help="Turns of the dialogue.")] = 30,
    budget: Annotated[str, typer.Option(help="Memory for keys and values.")] = "12MB",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Talks with an engine that keeps tiers, and with one that keeps all in 16 bits.

    The first turn gives a rule, small talk follows. Only what the user says is prepared. At some
    turns a question tests whether the rule holds; the dialogue then goes on as if it had not been
    asked.
    """
    options = ContextOptions(budget_bytes=parse_bytes("--budget", budget))
    show = print_json_line if as_json else print_line
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="modularbase-"))
        tiered, f16 = (
            stack.enter_context(Engine.load(base, kv=kv, n_threads=threads, pack_budget=0))
            for kv in ("tiered", "f16")
        )
        sides = (_Side(tiered, Path(folder), options), _Side(f16, Path(folder), None))
        stack.callback(sides[0].talk.close)
        stack.callback(sides[1].talk.close)
        if not as_json:
            err.print(f"the rule: {_RULE}", markup=False)
            print_head()
        for turn, said in enumerate(_said(turns), start=1):
            show(_row(turn, said, sides, is_probed=turn in _PROBED_TURNS or turn == turns))


class _Side:
    """One of the two engines, and its dialogue."""

    def __init__(self, engine: Engine, folder: Path, options: ContextOptions | None) -> None:
        self._engine, self._options = engine, options
        self._path = folder / f"{id(self)}.mbconv"
        self.talk: Conversation = engine.conversation(context=options)

    def probe(self, question: str) -> Answer:
        """Asks something that leaves no trace in the dialogue."""
        self.talk.save(self._path)
        with self._engine.conversation(context=self._options) as twin:
            twin.restore(self._path)
            return _answer(twin.chat(question, _PARAMS))


def _said(n_turns: int) -> Iterator[str]:
    yield _RULE
    yield from islice(cycle(_SMALL_TALK), n_turns - 1)


def _row(turn: int, said: str, sides: tuple[_Side, _Side], *, is_probed: bool) -> ContextRow:
    tiered, f16 = (side.talk.chat(said, _PARAMS) for side in sides)
    probe = None
    if is_probed:
        answers = [side.probe(_QUESTION) for side in sides]
        probe = Probe(question=_QUESTION, tiered=answers[0], f16=answers[1])
    report = tiered.context
    assert report is not None  # it is an engine with tiers
    return ContextRow(
        turn=turn,
        said=said,
        tiered=_answer(tiered),
        f16=_answer(f16),
        tokens=_by_tier(report.tokens, report.window_tokens),
        n_bytes=_by_tier(report.n_bytes, report.window_bytes),
        total_tokens=report.total_tokens,
        total_bytes=report.total_bytes,
        f16_bytes=report.exact_bytes,
        demoted={d.text: d.reason for d in report.demoted},
        probe=probe,
    )


def _by_tier(counts: Mapping[Tier, int], in_window: int) -> dict[str, int]:
    return {tier.value: counts[tier] for tier in Tier} | {"window": in_window}


def _answer(result: Result) -> Answer:
    return Answer(text=result.text, obeys=_WORD in result.text)
