"""What is compared over dialogues: systems that hold turns in some form, and answer behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.context.chat_tokens import WrittenTurns
from benchmarks.context.systems import ContextSystem, HeldContext
from modularbase.types import FloatArray


class HeldDialogue(Protocol):
    """Turns as a system keeps them; they stay as they are, whatever is asked behind them."""

    @property
    def n_bytes(self) -> int:
        """Of all keys and values, with what belongs to them."""

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """As `HeldContext.logits`."""

    def answer(self, question: str, max_tokens: int) -> list[int]:
        """What the system answers to a user's message, greedily."""

    def close(self) -> None:
        """Frees it."""


class DialogueSystem(Protocol):
    """A way to keep dialogues."""

    @property
    def name(self) -> str:
        """As tables have it."""

    def hold_turns(self, written: WrittenTurns) -> HeldDialogue:
        """Takes turns in."""


@dataclass(frozen=True)
class WholeDialogues:
    """A system that takes all turns in at once, as a context."""

    system: ContextSystem

    @property
    def name(self) -> str:
        """See DialogueSystem."""
        return self.system.name

    def hold_turns(self, written: WrittenTurns) -> HeldDialogue:
        """See DialogueSystem."""
        return _WholeDialogue(written, self.system.hold(written.ids))


@dataclass(frozen=True)
class _WholeDialogue:
    written: WrittenTurns
    held: HeldContext

    @property
    def n_bytes(self) -> int:
        return self.held.n_bytes

    def logits(self, ids: Sequence[int]) -> FloatArray:
        return self.held.logits(ids)

    def answer(self, question: str, max_tokens: int) -> list[int]:
        return self.held.generate(self.written.question(question), max_tokens)

    def close(self) -> None:
        pass
