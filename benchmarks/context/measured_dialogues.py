"""Dialogues: what becomes of their next turns, of the first turn's rules, and of facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.context.chat_tokens import ChatWriter, WrittenTurns
from benchmarks.context.dialogues import Dialogue, FactKind, Probe
from benchmarks.context.held_dialogues import DialogueSystem, HeldDialogue
from benchmarks.context.metrics import TokenDifferences, differences, mean_nll
from benchmarks.harness import Report


@dataclass(frozen=True)
class Answer:
    """What a system said to a probe.

    Attributes:
        obeyed: Of each rule whether it obeys it.
        kind: Of the fact that was asked for.
        is_known: Whether that is in it; None: none was asked for.
        nll: Of the right answer, nats a token; None: no fact was asked for.
        text: The answer.
    """

    obeyed: Mapping[str, bool]
    kind: FactKind | None
    is_known: bool | None
    nll: float | None
    text: str


@dataclass(frozen=True)
class DialogueOutcome:
    """One system behind one dialogue.

    Attributes:
        system: Its name.
        dialogue: Its number.
        n_tokens: Of the dialogue.
        n_bytes: Of its keys and values.
        compression: Bytes of the exact system over its own.
        differences: On the turns that follow, to the exact system.
        answers: To the probes.
    """

    system: str
    dialogue: int
    n_tokens: int
    n_bytes: int
    compression: float
    differences: TokenDifferences
    answers: Sequence[Answer]

    @property
    def values(self) -> Mapping[str, Any]:
        """All of it for programs, means instead of tokens."""
        found = self.differences
        means = {
            "kl": float(found.kl.mean()),
            "excess_nll": float(found.excess_nll.mean()),
            "top1": float(found.agreement.mean()),
        }
        kept = {name: value for name, value in vars(self).items() if name != "differences"}
        return {**kept, **means, "answers": [dict(vars(answer)) for answer in self.answers]}


def measure_dialogues(
    systems: Sequence[DialogueSystem],
    dialogues: Sequence[Dialogue],
    writer: ChatWriter,
    n_probes: int,
    max_tokens: int,
    report: Report,
) -> Iterator[Sequence[DialogueOutcome]]:
    """Lets each system hold each dialogue, read the turns that follow, and answer the probes.

    Args:
        systems: The exact one first, with which the others are compared.
        dialogues: Scripts.
        writer: Writes them in the base's form.
        n_probes: How many of the probes are asked.
        max_tokens: Of an answer.
        report: Told of each.

    Yields:
        All outcomes so far, after each dialogue.
    """
    found = list[DialogueOutcome]()
    for number, dialogue in enumerate(dialogues):
        written = writer.write(dialogue.turns)
        following = written.following(dialogue.following)
        reference, exact_bytes = None, 0
        for system in systems:
            held = system.hold_turns(written)
            logits = held.logits(following)
            if reference is None:
                reference, exact_bytes = logits, held.n_bytes
            outcome = DialogueOutcome(
                system=system.name,
                dialogue=number,
                n_tokens=len(written.ids),
                n_bytes=held.n_bytes,
                compression=exact_bytes / held.n_bytes,
                differences=differences(reference, logits, following),
                answers=list(_answers(held, written, dialogue, n_probes, max_tokens)),
            )
            held.close()
            found.append(outcome)
            kl = outcome.differences.kl.mean()
            report(f"dialogue {number}: {system.name}: {outcome.compression:.2f}x, KL {kl:.5f}")
        yield found


def _answers(
    held: HeldDialogue, written: WrittenTurns, dialogue: Dialogue, n_probes: int, max_tokens: int
) -> Iterator[Answer]:
    tokenizer = written.writer.tokenizer
    for probe in dialogue.probes[:n_probes]:
        text = tokenizer.decode(held.answer(probe.question, max_tokens)).strip()
        yield Answer(
            obeyed={rule.name: rule.is_obeyed(text) for rule in dialogue.rules},
            kind=probe.kind,
            is_known=probe.fact.is_known(text) if probe.fact else None,
            nll=_reply_nll(held, written, probe) if probe.fact else None,
            text=text,
        )


def _reply_nll(held: HeldDialogue, written: WrittenTurns, probe: Probe) -> float:
    assert probe.fact is not None
    question = written.question(probe.question)
    read = [*question, *written.writer.tokenizer.encode_plain(probe.fact.reply)]
    n_before = len(question) - 1  # this row tells the reply's first token
    return mean_nll(held.logits(read)[n_before:], read[n_before:])
