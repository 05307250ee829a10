"""What compactions take of the time of turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.context.engine_conversations import CountingTalk
from benchmarks.report import Table
from modularbase.types import SamplingParams


@dataclass(frozen=True)
class TurnTime:
    """One turn.

    Attributes:
        n_tokens: Of the conversation behind it.
        turn_us: From the message to the end of the compaction behind the answer.
        behind_us: Of that, from the end of the answer on: grading and compaction.
        compaction_us: Of that, compaction.
    """

    n_tokens: int
    turn_us: float
    behind_us: float
    compaction_us: float


def measure_turns(talk: CountingTalk, messages: Sequence[str], n_answer: int) -> Iterator[TurnTime]:
    """Talks on, each time up to `n_answer` tokens of answer whatever they say."""
    params = SamplingParams(max_tokens=n_answer, temperature=0.0, ignore_eos=True)
    for message in messages:
        started, before_us = time.monotonic(), sum(talk.compaction_us)
        talk.conversation.chat(message, params)
        ended = time.monotonic()
        yield TurnTime(
            n_tokens=len(talk.conversation.token_ids),
            turn_us=(ended - started) * 1e6,
            behind_us=(ended - talk.answered_at) * 1e6,
            compaction_us=sum(talk.compaction_us) - before_us,
        )


def share_table(turns: Sequence[TurnTime], compression: float, n_answer: int) -> Table:
    """Shares of the time of all turns, and the most of one turn's."""
    rows = []
    for name, spent in (
        ("compaction", [turn.compaction_us for turn in turns]),
        ("grading and compaction", [turn.behind_us for turn in turns]),
    ):
        whole = sum(turn.turn_us for turn in turns)
        most = max(us / turn.turn_us for us, turn in zip(spent, turns, strict=True))
        mean_ms = sum(spent) / len(spent) / 1e3
        rows.append([name, f"{sum(spent) / whole:.1%}", f"{most:.1%}", f"{mean_ms:.1f}"])
    title = (
        f"{len(turns)} turns with answers of {n_answer} tokens, {turns[-1].n_tokens} tokens in "
        f"all, {compression:.2f}x at the end"
    )
    return Table(title, ["", "of the turns' time", "most of a turn's", "ms a turn"], rows)
