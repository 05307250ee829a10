"""What `modularbase demo context` says of each turn: lines, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from modularbase.context_types import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an engine said.

    Attributes:
        text: All of it.
        obeys: Whether it obeys the first turn's rule.
    """

    text: str
    obeys: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A question that tests the rule, and that the dialogue does not go on with."""

    question: str
    tiered: Answer
    f16: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRow:
    """One turn.

    Attributes:
        turn: Its number, from 1.
        said: By the user.
        tiered: The answer of the engine with tiers.
        f16: The answer of the engine without.
        tokens: Of the context with tiers, by tier and in the window.
        n_bytes: What they take.
        total_tokens: All of them.
        total_bytes: What they take.
        f16_bytes: What the same tokens would take in 16 bits.
        demoted: Texts that became a summary after this turn, and why.
        probe: The question that was asked here, if one was.
    """

    turn: int
    said: str
    tiered: Answer
    f16: Answer
    tokens: Mapping[str, int]
    n_bytes: Mapping[str, int]
    total_tokens: int
    total_bytes: int
    f16_bytes: int
    demoted: Mapping[str, str]
    probe: Probe | None

    @property
    def ratio(self) -> float:
        """How many times as much F16 would take."""
        return self.f16_bytes / self.total_bytes


def print_head() -> None:
    """Names the columns of `print_line`."""
    names = "".join(f"{name:>10}" for name in (*(tier.value for tier in Tier), "window"))
    sys.stdout.write(f"turn tokens    F16    now{names} MB   less\n")


def print_line(row: ContextRow) -> None:
    """Prints a turn: bytes in MB by tier, what was demoted, and how a probe was answered."""
    parts = "".join(f"{n_bytes / 1e6:10.2f}" for n_bytes in row.n_bytes.values())
    sys.stdout.write(
        f"{row.turn:4} {row.total_tokens:6} {row.f16_bytes / 1e6:6.2f} {row.total_bytes / 1e6:6.2f}"
        f"{parts}    x {row.ratio:.2f}\n"
    )
    for text, reason in row.demoted.items():
        sys.stdout.write(f"       summarised: {_short(text)} ({reason})\n")
    if row.probe:
        sys.stdout.write(f"     > {row.probe.question}\n")
        for name, answer in (("tiered", row.probe.tiered), ("F16", row.probe.f16)):
            mark = "obeys" if answer.obeys else "does not obey"
            sys.stdout.write(f"       {name:>6} {mark}: {_short(answer.text)}\n")
    sys.stdout.flush()


def print_json_line(row: ContextRow) -> None:
    """The same for scripts: a JSON document a line."""
    sys.stdout.write(json.dumps({**asdict(row), "ratio": row.ratio}, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _short(text: str) -> str:
    """The text on one line, at most 90 characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= 90 else f"{line[:89]}…"
