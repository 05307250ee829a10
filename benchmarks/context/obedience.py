"""Dialogues: whether the first turn's rules still hold, and facts are known, many turns later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.context.chat_tokens import ChatTokens
from benchmarks.context.dialogues import Dialogue
from benchmarks.context.metrics import mean_nll
from benchmarks.context.systems import ContextSystem, HeldContext
from benchmarks.harness import Report


@dataclass(frozen=True)
class ProbeOutcome:
    """One answer of one system.

    Attributes:
        system: Its name.
        dialogue: Its number.
        n_tokens: Of the context.
        compression: Bytes of the first system's context over its own.
        turn: Of the probe.
        obeyed: Of each rule whether the answer obeys it.
        is_known: Whether a fact that was asked for is in the answer; None: none was.
        fact_turn: Where it was said.
        reply_nll: Of the scripted reply, which obeys and is right, in nats a token.
        answer: What was generated.
    """

    system: str
    dialogue: int
    n_tokens: int
    compression: float
    turn: int
    obeyed: dict[str, bool]
    is_known: bool | None
    fact_turn: int | None
    reply_nll: float
    answer: str


def measure_obedience(
    systems: Sequence[ContextSystem],
    dialogues: Iterable[Dialogue],
    chat: ChatTokens,
    max_tokens: int,
    report: Report,
) -> list[ProbeOutcome]:
    """Asks each system all questions of each dialogue behind the turns that went before.

    Args:
        systems: The first is what compression is told against.
        dialogues: Scripts.
        chat: Writes them in the base's form.
        max_tokens: Of an answer.
        report: Told of each answer.
    """
    found = list[ProbeOutcome]()
    for number, dialogue in enumerate(dialogues):
        # The longest context first: it begins with all the others.
        for turn in sorted({probe.turn for probe in dialogue.probes}, reverse=True):
            ids, tiers = chat.context(dialogue.turns[: turn - 1])
            exact_bytes: int | None = None
            for system in systems:
                held = system.hold(ids, tiers)
                exact_bytes = exact_bytes or held.n_bytes
                place = _Place(system.name, number, len(ids), exact_bytes / held.n_bytes)
                for outcome in _outcomes(place, held, dialogue, turn, chat, max_tokens):
                    found.append(outcome)
                    report(f"dialogue {number}, turn {turn}: {system.name}: {outcome.answer!r}")
    return found


@dataclass(frozen=True)
class _Place:
    """Where an answer is given: the first fields of its outcome."""

    system: str
    dialogue: int
    n_tokens: int
    compression: float


def _outcomes(
    place: _Place,
    held: HeldContext,
    dialogue: Dialogue,
    turn: int,
    chat: ChatTokens,
    max_tokens: int,
) -> Iterator[ProbeOutcome]:
    """Of the probes of one turn."""
    for probe in dialogue.probes:
        if probe.turn != turn:
            continue
        question = chat.question(dialogue.turns[: turn - 1], probe.question)
        answer = chat.tokenizer.decode(held.generate(question, max_tokens)).strip()
        read = [*question, *chat.tokenizer.encode_plain(probe.reply)]
        n_before = len(question) - 1  # this row tells the reply's first token
        yield ProbeOutcome(
            **asdict(place),
            turn=turn,
            obeyed={rule.name: rule.is_obeyed(answer) for rule in dialogue.rules},
            is_known=probe.fact.is_known(answer) if probe.fact else None,
            fact_turn=probe.fact_turn,
            reply_nll=mean_nll(held.logits(read)[n_before:], read[n_before:]),
            answer=answer,
        )
